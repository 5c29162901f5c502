"""Projections of random numbers, the dense float64 algebra they are held against, and what a function keeps for the way back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from luthier.ops.projection import Projection

WIDTH = 13
each_products = pytest.mark.parametrize("products", [None, torch.float32], ids=["own products", "float32 products"])


@dataclass(frozen=True)
class Spec:
    """One projection to make; r = 0 is one without a pair."""

    out: int
    r: int = 0
    scaling: float = 1.0
    bias: bool = False
    dropout: float = 0.0


def make(
    specs: Sequence[Spec], *, dtype: torch.dtype = torch.float64, master: torch.dtype | None = None, width: int = WIDTH
) -> list[Projection]:
    """Return projections with random numbers everywhere; the pairs are leaves in `master` (or `dtype`)."""
    master = master or dtype
    return [
        Projection(
            (torch.randn(spec.out, width) / width**0.5).to(dtype),
            torch.randn(spec.out).to(dtype) if spec.bias else None,
            (torch.randn(spec.r, width) / width**0.5).to(master).requires_grad_() if spec.r else None,
            (torch.randn(spec.out, spec.r) / max(1, spec.r) ** 0.5).to(master).requires_grad_() if spec.r else None,
            spec.scaling,
            spec.dropout,
        )
        for spec in specs
    ]


def factors_of(projections: Sequence[Projection]) -> list[Tensor]:
    return [factor for each in projections for factor in (each.lora_A, each.lora_B) if factor is not None]


def dense(x: Tensor, projections: Sequence[Projection], upstreams: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs x (W + s B A)^T + b in float64, and the gradients of x and of every factor."""
    x = x.detach().double().requires_grad_()
    leaves, outputs = [x], []
    for each in projections:
        weight = each.weight.double()
        if each.lora_A is not None and each.lora_B is not None:
            lora_A, lora_B = (factor.detach().double().requires_grad_() for factor in (each.lora_A, each.lora_B))
            leaves += [lora_A, lora_B]
            weight = weight + each.scaling * lora_B @ lora_A
        outputs.append(x @ weight.T + (0 if each.bias is None else each.bias.double()))
    total = sum((y * dy.double()).sum() for y, dy in zip(outputs, upstreams, strict=True))
    return [y.detach() for y in outputs], list(torch.autograd.grad(total, leaves))


def run(
    function: Callable, x: Tensor, projections: Sequence[Projection], upstreams: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = function(x, projections)
    gradients = torch.autograd.grad(outputs, [x, *factors_of(projections)], list(upstreams))
    return [y.detach() for y in outputs], list(gradients)


def upstreams_for(x: Tensor, projections: Sequence[Projection]) -> list[Tensor]:
    return [torch.randn(*x.shape[:-1], len(each.weight)).to(x.dtype) for each in projections]


def assert_all_close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    assert len(found) == len(wanted)
    for index, (each, want) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(
            each.double(), want.double(), rtol=tolerance, atol=tolerance, msg=lambda text, at=index: f"number {at}: {text}"
        )


def saved_tensors(function: Callable[[], object]) -> list[Tensor]:
    """Return what is kept for the backward pass, each piece of memory once."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return list(kept.values())


def saved_bytes(function: Callable[[], object], without: Sequence[Tensor | None]) -> int:
    known = {tensor.untyped_storage().data_ptr() for tensor in without if tensor is not None}
    saved = [tensor.untyped_storage() for tensor in saved_tensors(function)]
    return sum(storage.nbytes() for storage in saved if storage.data_ptr() not in known)


def inputs_of(projections: Sequence[Projection]) -> list[Tensor | None]:
    return [tensor for each in projections for tensor in (each.weight, each.bias, each.lora_A, each.lora_B)]


def norm_of_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    return [float((each.detach().double() - want).norm()) for each, want in zip(found, wanted, strict=True)]
