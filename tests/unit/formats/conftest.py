"""A tiny model with an adapter on it, and the same adapter in a folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.adapt.attaching import attach
from luthier.core.config import LoraConfig
from luthier.formats.adapters import save_adapter

Adapted = Callable[..., nn.Module]


@pytest.fixture
def adapted(tiny_llama: Callable[..., nn.Module]) -> Adapted:
    """Return a factory of tiny models that carry an adapter of random numbers; arguments are LoraConfig's."""

    def make(model: nn.Module | None = None, name: str = "default", seed: int = 7, **config: object) -> nn.Module:
        model = tiny_llama() if model is None else model
        torch.manual_seed(seed)
        attach(model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]} | config)), name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and f".{name}." in key:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        return model

    return make


@pytest.fixture
def saved(adapted: Adapted, tmp_path: Path) -> Path:
    """Return a folder with an adapter of q_proj and down_proj, trained on `tiny_llama()`."""
    return save_adapter(adapted(), tmp_path / "sql-v3")
