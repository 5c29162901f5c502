"""stored_pairs(): what lies in a folder gives, as one matrix, the update that the live layer computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.parity.cases import Convolutions, Plain
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError
from luthier.core.lora import lora_convolution
from luthier.formats.adapters import save_adapter
from luthier.formats.folder import read_adapter, write_adapter
from luthier.formats.pairs import StoredPair, stored_pairs


def stored(model: nn.Module, config: LoraConfig, folder: Path) -> dict[str, StoredPair]:
    """Attach an adapter of random numbers, save it, and return its pairs by path as they are read back."""
    attach(model, config)
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.copy_(torch.randn(item.parameter.shape))
    return {pair.path: pair for pair in stored_pairs(read_adapter(save_adapter(model, folder)))}


def dense(pair: StoredPair) -> torch.Tensor:
    A, B = pair.matrices()
    return pair.scaling * B @ A


def test_linear_and_embedding(tmp_path: Path) -> None:
    model = Plain()
    weights = {name: module.weight.detach().clone() for name, module in model.named_modules() if name in ("table", "first")}
    pairs = stored(model, LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=["table", "first"]), tmp_path / "a")
    assert {path: (pair.kind, pair.parameter) for path, pair in pairs.items()} == {
        "table": ("embedding", "table.weight"),
        "first": ("linear", "first.weight"),
    }
    # By the outputs of the layers: of every id, and of every axis of the input.
    with torch.no_grad():
        table = model.table(torch.arange(211)).double() - weights["table"].double()
        first = (model.first(torch.eye(13)) - model.first(torch.zeros(13))).double() - weights["first"].double().T
    torch.testing.assert_close(dense(pairs["table"]), table.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(pairs["first"]), first.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", ["line", "plane", "grouped", "volume"])
def test_a_convolution_is_its_update_with_the_window_flattened(layer: str, tmp_path: Path) -> None:
    model = Convolutions()
    pair = stored(model, LoraConfig(r=4, lora_alpha=3, target_modules=[layer]), tmp_path / "a")[layer]
    assert pair.kind == "convolution" and pair.groups == (2 if layer == "grouped" else 1)
    window = pair.lora_A.shape[1:]
    x = torch.randn(2, window[0], *(7 for _ in window[1:]), dtype=torch.float64)
    ways: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 1}
    axes = len(window) - 1
    settings: dict[str, Any] = {key: (value,) * axes for key, value in ways.items()}
    by_pair = lora_convolution(x, pair.lora_A.double(), pair.lora_B.double(), pair.scaling, **settings, groups=pair.groups)
    one = (F.conv1d, F.conv2d, F.conv3d)[axes - 1](x, dense(pair).unflatten(1, window), **ways)
    torch.testing.assert_close(one, by_pair, rtol=1e-10, atol=1e-10)


def test_attention_has_two_pairs_with_one_owner(tmp_path: Path) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3)})
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attention"], alpha_pattern={"attention": 10})
    pairs = stored(model, config, tmp_path / "a")
    assert {path: (pair.kind, pair.parameter, pair.owner, pair.scaling) for path, pair in pairs.items()} == {
        "attention": ("attention", "attention.in_proj_weight", "attention", 5),
        "attention.out_proj": ("linear", "attention.out_proj.weight", "attention", 5),
    }
    live = model["attention"].lora["default"]
    torch.testing.assert_close(dense(pairs["attention"]), live.delta().double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dense(pairs["attention.out_proj"]), live.out.delta().double(), rtol=1e-5, atol=1e-5)


def test_the_sizes_of_adalora_s_triplets_are_in_its_update(tmp_path: Path) -> None:
    model = Plain()
    pair = stored(model, AdaLoraConfig(init_r=3, target_r=2, lora_alpha=4, target_modules=["first"]), tmp_path / "a")["first"]
    live = model.first.lora["default"]
    expected = 4 / 3.00001 * live.lora_B.double() @ torch.diag(live.lora_E.double().view(-1)) @ live.lora_A.double()
    torch.testing.assert_close(dense(pair), expected.detach(), rtol=1e-12, atol=1e-12)


def test_halves_and_ranks_that_do_not_fit_are_listed(saved: Path, tmp_path: Path) -> None:
    folder = read_adapter(saved)
    keys = sorted(folder.tensors)
    tensors = {key: tensor for key, tensor in folder.tensors.items() if key != keys[0]}
    tensors[keys[-1]] = torch.zeros(48, 2)
    damaged = write_adapter(tmp_path / "damaged", (saved / "adapter_config.json").read_text(), tensors, "", {})
    with pytest.raises(AdapterFormatError) as told:
        stored_pairs(read_adapter(damaged))
    assert "2 pairs are damaged" in str(told.value)
    assert f"{keys[1]} has no other half" in str(told.value)
    assert "(48, 2) do not share a rank" in str(told.value)
