"""LoftQ: the pair gives back what 4 bits lose, the more the oftener it is fitted; saved, it says how to make its base again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from luthier.adapt import adapter_parameters, attach, attach_loftq, detach, quantize_linears
from luthier.adapt.loftq import minus_of
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, ConfigError, TargetError
from luthier.formats import load_adapter, save_adapter
from luthier.formats.folder import MINUS_FILE, read_adapter
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor
from luthier.quant.tables import NF4_VALUES

IDS = torch.arange(3, 15)[None]


def loftq(num_iter: int = 1, **settings: object) -> LoraConfig:
    return LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": num_iter, "loftq_bits": 4}, **settings)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def rounded_by_hand(weight: np.ndarray) -> np.ndarray:
    """Return the nearest NF4 values (float scales) of a weight whose size is a multiple of 64, in float64."""
    blocks, table = weight.reshape(-1, 64), np.array(NF4_VALUES)
    largest = abs(blocks).max(axis=1, keepdims=True)
    return (table[abs(blocks[:, :, None] / largest[:, :, None] - table).argmin(axis=2)] * largest).reshape(weight.shape)


def loftq_by_hand(weight: np.ndarray, r: int, num_iter: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Q and the product of the pair (scaling included), in float64: Li et al. 2023, algorithm 1."""
    product = np.zeros_like(weight)
    for _ in range(num_iter):
        q = rounded_by_hand(weight - product)
        u, s, vt = np.linalg.svd(weight - q, full_matrices=False)
        product = (u[:, :r] * s[:r]) @ vt[:r]
    return q, product


@pytest.mark.parametrize("num_iter", [1, 2, 5])
@pytest.mark.parametrize("scaling", [{"lora_alpha": 16}, {"lora_alpha": 4}, {"lora_alpha": 8, "use_rslora": True}], ids=str)
def test_weight_and_pair_are_those_of_the_algorithm_in_float64(num_iter: int, scaling: dict[str, float]) -> None:
    layer = nn.Sequential(nn.Linear(64, 48))
    weight = layer[0].weight.detach().double().numpy()
    attach_loftq(layer, loftq(num_iter, r=8, target_modules=["0"], **scaling), double=False)
    q, product = loftq_by_hand(weight, 8, num_iter)
    torch.testing.assert_close(layer[0].weight.read().double(), torch.from_numpy(q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer[0].lora["default"].delta().double(), torch.from_numpy(product), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_lost_shrinks_with_every_fit(dtype: torch.dtype) -> None:
    weight, lost = torch.randn(256, 192).to(dtype), []
    for num_iter in range(1, 6):
        layer = nn.Sequential(nn.Linear(192, 256, dtype=dtype))
        layer[0].weight.data.copy_(weight)
        attach_loftq(layer, loftq(num_iter, r=16, target_modules=["0"]))
        pair, q = layer[0].lora["default"], layer[0].weight.read().double()
        lost.append(((q + pair.delta().double() - weight.double()).norm() / weight.double().norm()).item())
    assert lost == sorted(lost, reverse=True)
    assert lost[0] < 0.083, "4 bits alone lose 0.092"
    assert lost[-1] < 0.073


def test_one_fit_leaves_the_base_that_quantising_gives(tiny_llama: Callable[..., nn.Module]) -> None:
    model, plain = tiny_llama(), tiny_llama()
    planned, packing = attach_loftq(model, loftq(r=4))
    quantize_linears(plain)
    assert len(planned.layers) == len(packing.packed) == 14
    assert not minus_of(model)
    fitted, base = logits(model), logits(tiny_llama())
    detach(model)
    assert torch.equal(logits(model), logits(plain))
    assert (fitted - base).norm() < (logits(plain) - base).norm()


def test_layers_without_a_pair_are_quantised_all_the_same(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach_loftq(model, loftq(2, r=4, target_modules=["q_proj"]))
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 14
    assert set(minus_of(model)) == {f"model.layers.{index}.self_attn.q_proj" for index in range(2)}
    assert not isinstance(model.lm_head.weight, PackedTensor)


@pytest.mark.parametrize("num_iter", [1, 3])
@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}], ids=str)
def test_a_trained_adapter_comes_back_to_the_same_function(
    tiny_llama: Callable[..., nn.Module], fill: Callable[..., None], tmp_path: Path, num_iter: int, method: dict[str, object]
) -> None:
    model, fresh = tiny_llama(), tiny_llama()
    attach_loftq(model, loftq(num_iter, r=4, **method))
    fill(model, size=0.05)
    save_adapter(model, tmp_path / "adapter")
    folder = read_adapter(tmp_path / "adapter")
    assert folder.config.init_lora_weights is True
    assert not folder.config.loftq_config
    assert folder.note["recipe"]["loftq"] == {"loftq_iter": num_iter, "loftq_bits": 4}
    assert (tmp_path / "adapter" / MINUS_FILE).exists() == bool(folder.minus) == (num_iter > 1)
    quantize_linears(fresh, minus=folder.minus)
    report = load_adapter(fresh, tmp_path / "adapter")
    assert report.base.verdict == "exact"
    assert torch.equal(logits(fresh), logits(model))
    save_adapter(fresh, tmp_path / "again")
    assert read_adapter(tmp_path / "again").minus.keys() == folder.minus.keys()


def test_it_does_not_load_on_the_base_of_plain_quantising(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model, plain = tiny_llama(), tiny_llama()
    attach_loftq(model, loftq(3, r=4))
    save_adapter(model, tmp_path / "adapter")
    quantize_linears(plain)
    with pytest.raises(BaseMismatchError):
        load_adapter(plain, tmp_path / "adapter")


def test_a_folder_without_what_makes_its_base_is_refused(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_llama()
    attach_loftq(model, loftq(2, r=4))
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / MINUS_FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(AdapterFormatError, match=f"{MINUS_FILE} changed since"):
        read_adapter(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(AdapterFormatError, match=f"has no {MINUS_FILE}"):
        read_adapter(tmp_path / "adapter")


def test_only_an_unquantised_base_that_will_be_quantised_is_taken(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterStateError, match="here they stay as they are; attach_loftq"):
        attach(model, loftq(r=4))
    with pytest.raises(ConfigError, match="needs init_lora_weights='loftq', not True"):
        attach_loftq(model, LoraConfig(r=4))
    with pytest.raises(TargetError, match=r"2 layers:\n  model\.layers\.0\.mlp\.up_proj: named in skip"):
        attach_loftq(model, loftq(r=4), skip=["up_proj"])
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    quantize_linears(model)
    with pytest.raises(AdapterStateError, match="are there already: load it unquantised"):
        attach(model, loftq(r=4))
    with pytest.raises(TargetError, match=r"14 layers:\n.*in 4 bits already, and the weight that it was made of is gone"):
        attach_loftq(model, loftq(r=4))
    attach(model, LoraConfig(r=4))
    with pytest.raises(AdapterStateError, match="detach them first"):
        attach_loftq(model, loftq(r=4))


def test_layers_that_cannot_be_fitted_are_refused() -> None:
    model = nn.Sequential(nn.Linear(13, 7), nn.Embedding(5, 7))
    with pytest.raises(TargetError, match="r=8 directions from a weight of 7 x 13"):
        attach_loftq(model, loftq(r=8, target_modules=["0"]))
    with pytest.raises(TargetError, match="is for linear layers"):
        attach_loftq(model, loftq(r=4, target_modules=["1"]))
    assert type(model[0]) is nn.Linear


def test_taking_off_needs_a_layer_to_take_it_off(tiny_llama: Callable[..., nn.Module]) -> None:
    model, pair = tiny_llama(), (torch.zeros(211, 2), torch.zeros(2, 48))
    with pytest.raises(ConfigError, match=r"nowhere: no linear layer of this model(.|\n)*lm_head: named in skip"):
        quantize_linears(model, minus={"nowhere": pair, "lm_head": pair})
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"loftq_config": {"loftq_iter": 2}}, "no effect without"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8}}, "loftq_bits is 8; weights are stored in 4 bits"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 0}}, "must be at least 1"),
        ({"init_lora_weights": "loftq", "loftq_config": {"iterations": 2}}, "and no iterations"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        LoraConfig(**settings)
    with pytest.raises(ConfigError):
        AdaLoraConfig(**settings)


def test_training_starts_where_it_was_fitted(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach_loftq(model, loftq(2, r=4))
    model(IDS).logits.square().sum().backward()
    assert all(each.parameter.grad.any() for each in adapter_parameters(model))


class Codings(TorchFunctionMode):
    """Counts how often weights (of one chunk each) are given their codes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.bucketize
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_iter", [1, 3])
def test_a_weight_is_put_into_4_bits_once_for_each_fit(tiny_llama: Callable[..., nn.Module], num_iter: int) -> None:
    quantize_linears(tiny_llama())  # builds the tables
    with Codings() as codings:
        attach_loftq(tiny_llama(), loftq(num_iter, r=4, target_modules=["q_proj", "v_proj"]))
    assert codings.count == 4 * num_iter + 10
