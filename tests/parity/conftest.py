"""The models of the cases, by name, and how PEFT makes, writes and reads an adapter."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.cases import Convolutions, MakeModel, Plain, randomise
from torch import nn


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model(tiny_llama: Callable[..., nn.Module], tiny_gpt2: Callable[..., nn.Module]) -> MakeModel:
    """Return a factory: the same name gives the same weights each time."""

    def make(name: str) -> nn.Module:
        if name == "plain":
            torch.manual_seed(3)
            return Plain().eval()
        if name == "convolutions":
            torch.manual_seed(3)
            return Convolutions().eval()
        if name == "gpt2":
            return tiny_gpt2()
        model = tiny_llama(
            attention_bias=name == "llama-bias", mlp_bias=name == "llama-bias", tie_word_embeddings=name == "llama-tied"
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(".bias"):  # transformers starts them at zero, where a lost bias would not show
                    parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
        return model

    return make


@pytest.fixture
def peft_written(make_model: MakeModel, tmp_path: Path) -> Callable[..., tuple[nn.Module, Path]]:
    """Return a function that makes, randomises and saves an adapter with PEFT: (the live PEFT model, the folder)."""
    from peft import LoraConfig, get_peft_model

    def write(model: str, config: dict[str, Any], *, name: str = "default", **saving: Any) -> tuple[nn.Module, Path]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says about its own adapters is not what is tested
            live = get_peft_model(make_model(model), LoraConfig(**config), adapter_name=name)
            randomise(live)
            live.eval().save_pretrained(tmp_path / "peft", **saving)
        return live, tmp_path / "peft" / ("" if name == "default" else name)

    return write
