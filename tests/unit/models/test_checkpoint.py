"""Checkpoint: weights by the names that the model's parameters have, one at a time; and which bases are here already."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from luthier.core.errors import ModelError
from luthier.models import Checkpoint, pulled


def test_weights_are_those_of_the_loaded_model(tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_gpt2()
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "without-head")  # its names lack the first part
    named = dict(model.named_parameters())
    for folder, names in (("whole", named), ("without-head", {name: it for name, it in named.items() if "lm_head" not in name})):
        checkpoint = Checkpoint(tmp_path / folder)
        for name, parameter in names.items():
            found = checkpoint.find(name)
            assert found is not None and torch.equal(found, parameter), name
        assert checkpoint.find("transformer.h.7.attn.c_attn.weight") is None
    # An adapter may have been trained on the model without its head, and the file be of the whole.
    found = Checkpoint(tmp_path / "whole").find("h.1.mlp.c_fc.weight")
    assert found is not None and torch.equal(found, named["transformer.h.1.mlp.c_fc.weight"])


def test_a_name_that_two_weights_could_mean_means_none(tmp_path: Path) -> None:
    save_file({f"{part}.layer.weight": torch.ones(2, 2) for part in ("encoder", "decoder")}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).find("layer.weight") is None
    assert Checkpoint(tmp_path).find("encoder.layer.weight") is not None


def test_shards_are_found_and_packed_weights_are_not_taken_for_numbers(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(3, 5), "b.weight": torch.arange(4, dtype=torch.uint8)}
    for index, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"{index}.safetensors")
    index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(tensors)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    found = checkpoint.find("a.weight")
    assert found is not None and torch.equal(found, tensors["a.weight"])
    assert checkpoint.find("b.weight") is None


def test_what_would_have_to_be_fetched_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    assert pulled("org/model") is None and pulled("some-wheel==1.0") is None
    cached = tmp_path / "models" / "org--model"
    cached.mkdir(parents=True)
    (cached / "luthier-model.json").write_text("{}")
    assert pulled("org/model") == cached
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    assert pulled(str(tmp_path / "base")) == tmp_path / "base"
    with pytest.raises(ModelError, match="No folder"):
        pulled("./absent")
