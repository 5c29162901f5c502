"""describe_adapter(): the numbers of an adapter against dense products in float64."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.formats.adapters import save_adapter
from luthier.formats.contents import describe_adapter
from luthier.formats.folder import read_adapter

Make = Callable[..., nn.Module]


def test_norms_are_those_of_the_dense_update(adapted: Make, tmp_path: Path) -> None:
    model = adapted(
        r=5,
        lora_alpha=3,
        use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"layers.0.*": 2},
        alpha_pattern={"q_proj": 11.5},
    )
    described = describe_adapter(read_adapter(save_adapter(model, tmp_path / "a")))
    layers = {layer["path"]: layer for layer in described["layers"]}
    pairs = {path: module.lora["default"] for path, module in model.named_modules() if "default" in getattr(module, "lora", {})}
    assert layers.keys() == pairs.keys() and len(layers) == 5
    for path, pair in pairs.items():
        r = 2 if "layers.0." in path else 5
        scaling = (11.5 if path.endswith("q_proj") else 3) / r**0.5
        dense = scaling * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
        assert layers[path]["r"] == r
        assert layers[path]["scaling"] == pytest.approx(scaling, rel=1e-12)
        assert layers[path]["delta_norm"] == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-9)
        assert layers[path]["A_norm"] == pytest.approx(float(torch.linalg.norm(pair.lora_A.detach().double())), rel=1e-9)
        assert layers[path]["B_norm"] == pytest.approx(float(torch.linalg.norm(pair.lora_B.detach().double())), rel=1e-9)


def test_counts_and_words(saved: Path) -> None:
    described = describe_adapter(read_adapter(saved))
    # Two layers of q_proj 48 -> 48 and down_proj 123 -> 48 at r = 3.
    assert described["num_parameters"] == 2 * 3 * (48 + 48 + 123 + 48)
    assert described["bytes"] == (saved / "adapter_model.safetensors").stat().st_size
    assert described["method"] == "LoRA, r=3, alpha=5" and described["targets"] == "down_proj, q_proj"
    assert described["tensors"] == "8 in float32"
    assert described["fingerprint"] == json.loads((saved / "luthier.json").read_text())["base"]["sample_digest"][:16]
    json.dumps(described)


def test_dora_counts_its_magnitudes(adapted: Make, tmp_path: Path) -> None:
    model = adapted(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], use_dora=True)
    described = describe_adapter(read_adapter(save_adapter(model, tmp_path / "a")))
    assert described["method"] == "DoRA, r=3, alpha=5"
    assert described["num_parameters"] == 2 * (3 * (48 + 48) + 48) + 3 * (211 + 48) + 48
    assert "DoRA" in (tmp_path / "a/README.md").read_text()


def test_an_adapter_of_another_program(saved: Path) -> None:
    (saved / "luthier.json").unlink()
    described = describe_adapter(read_adapter(saved))
    assert described["fingerprint"] is None and described["trained by"] == "" and described["recipe"] == {}
    assert len(described["layers"]) == 4


def test_an_adapter_without_pairs_claims_no_rank(adapted: Make, tmp_path: Path) -> None:
    model = adapted(target_modules=[], modules_to_save=["lm_head", "model.norm"])
    described = describe_adapter(read_adapter(save_adapter(model, tmp_path / "a")))
    assert described["method"] == "no pairs: parts of the base are trained whole" and not described["targets"]
    assert described["besides"] == "saved whole: lm_head, model.norm"
    card = (tmp_path / "a/README.md").read_text()
    assert "no pairs" in card and "saved whole: lm_head, model.norm" in card and "r=8" not in card
