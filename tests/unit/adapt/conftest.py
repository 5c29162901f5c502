"""Tools of the adapt tests: trained-looking adapters, and the same model with dense weights as the oracle."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Models this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def fill() -> Callable[..., None]:
    """Return a function that gives an adapter numbers as if it had been trained: no factor is zero."""

    def filled(model: nn.Module, name: str = "default", size: float = 0.3) -> None:
        for path, parameter in model.named_parameters():
            if f".lora.{name}." in path or (f".replacements.{name}." in path and parameter.requires_grad):
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * size)

    return filled


@pytest.fixture
def dense_twin() -> Callable[..., nn.Module]:
    """Return a function that builds the oracle: a plain float64 copy of the base with W + weight * scaling * B A written in.

    `base` must be a copy made before anything was attached; `scaling` is worked out by the test.
    """

    def twin(base: nn.Module, adapted: nn.Module, scaling: float, weights: dict[str, float] | None = None) -> nn.Module:
        dense = copy.deepcopy(base).double()
        numbers = {path: tensor.double() for path, tensor in adapted.state_dict().items()}
        for name, weight in (weights or {"default": 1.0}).items():
            for path, module in dense.named_modules():
                lora_A = numbers.get(f"{path}.lora.{name}.lora_A")
                if lora_A is None:
                    continue
                delta = weight * scaling * numbers[f"{path}.lora.{name}.lora_B"] @ lora_A
                turned = type(module).__name__ in {"Conv1D", "Embedding"}
                # A new parameter, so that a weight shared with another module is not changed there.
                module.weight = nn.Parameter(module.weight.detach() + (delta.T if turned else delta))
        return dense

    return twin


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return a function that copies a model's state_dict."""
    return lambda model: {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
