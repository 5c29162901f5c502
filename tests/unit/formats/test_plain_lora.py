"""An AdaLoRA adapter written as plain LoRA computes the same, in luthier and in PEFT."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.ranks import adalora_pairs, drop_masked
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.contents import describe_adapter
from luthier.formats.folder import read_adapter

IDS = torch.tensor([[5, 17, 200, 3, 42, 42, 9], [1, 0, 77, 121, 6, 13, 210]])
MASKS = [[0, 0, 0], [1, 1, 1], [1, 0, 1], [0, 1, 0]]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def triplets(tiny_llama: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Return a factory of models with an AdaLoRA adapter whose layers have ranks of 0, 3, 2 and 1."""

    def make(*, tied: bool = False, **changed: Any) -> nn.Module:
        model = tiny_llama(tie_word_embeddings=tied)
        attach(model, AdaLoraConfig(init_r=3, target_r=2, lora_alpha=40, target_modules=["q_proj", "down_proj"], **changed))
        with torch.no_grad():
            for item in adapter_parameters(model):
                item.parameter.add_(0.2 * torch.randn(item.parameter.shape))
            for (_, pair), mask in zip(adalora_pairs(model), MASKS, strict=True):
                pair.lora_E.mul_(torch.tensor(mask).unsqueeze(1))
        return model

    return make


@pytest.mark.parametrize("drops", [False, True])
def test_the_plain_lora_computes_the_same(
    triplets: Callable[..., nn.Module], tiny_llama: Callable[..., nn.Module], drops: bool, tmp_path: Path
) -> None:
    model = triplets(modules_to_save=["lm_head"])
    expected = logits(model)
    if drops:
        drop_masked(model)
    save_adapter(model, tmp_path / "plain", as_lora=True)
    config = read_adapter(tmp_path / "plain").config
    assert type(config) is LoraConfig
    assert (config.r, list(config.rank_pattern.values()), len(config.target_modules)) == (3, [2, 1], 3)
    ours = tiny_llama()
    load_adapter(ours, tmp_path / "plain")
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
    assert (logits(tiny_llama()) - expected).abs().max() > 1e-2


def test_a_table_trained_for_both_its_users_is_read_back_as_one(
    triplets: Callable[..., nn.Module], tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = triplets(tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    save_adapter(model, tmp_path / "plain", as_lora=True)
    again = tiny_llama(tie_word_embeddings=True)
    load_adapter(again, tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_what_is_inspected_is_the_dense_update(triplets: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = triplets()
    drop_masked(model)
    save_adapter(model, tmp_path / "ada")
    save_adapter(model, tmp_path / "plain", as_lora=True)
    described = describe_adapter(read_adapter(tmp_path / "ada"))
    assert described["method"] == "AdaLoRA, r=3 to 2 on average, alpha=40"
    json.dumps(described)
    found = {layer["path"]: layer for layer in described["layers"]}
    plain = {layer["path"]: layer for layer in describe_adapter(read_adapter(tmp_path / "plain"))["layers"]}
    for path, pair in adalora_pairs(model):
        A, B, E = (getattr(pair, role).detach().double() for role in ("lora_A", "lora_B", "lora_E"))
        norm = float(torch.linalg.matrix_norm(B @ torch.diag(E.view(-1)) @ A)) * 40 / 3.00001
        assert found[path]["r"] == len(E)
        assert found[path]["delta_norm"] == pytest.approx(norm, rel=1e-9)
        if len(E):
            assert plain[path]["delta_norm"] == pytest.approx(norm, rel=1e-6)
    assert "AdaLoRA, r=3 to 2 on average, alpha=40" in (tmp_path / "ada" / "README.md").read_text()


def test_what_cannot_be_plain_is_refused(
    triplets: Callable[..., nn.Module], tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    plain = tiny_llama()
    attach(plain, LoraConfig(target_modules=["q_proj"]))
    fresh = tiny_llama()
    attach(fresh, AdaLoraConfig(target_modules=["q_proj"]))
    for model, told in ((plain, "is no AdaLoRA adapter"), (fresh, "every triplet"), (triplets(bias="all"), "trains biases")):
        with pytest.raises(AdapterStateError, match=told):
            save_adapter(model, tmp_path / "plain", as_lora=True)
        assert not (tmp_path / "plain").exists()
