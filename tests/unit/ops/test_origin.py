"""What a projection keeps of a norm's output: nothing of its own, and the gradients are those of the plain expressions."""

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from luthier.ops.elementwise import rms_norm, rms_norm_plain
from luthier.ops.projection import Projection, adapted_projections, adapted_projections_plain

N, I, O, R = 11, 13, 7, 3  # noqa: E741  the letters of the shapes


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Projection], list[Tensor]]:
    """Return x, a norm's weight, two projections, and everything that gets a gradient."""
    x = torch.randn(1, N, I, dtype=dtype, requires_grad=True)
    pairs = [[torch.randn(R, I).to(dtype).requires_grad_(), torch.randn(O, R).to(dtype).requires_grad_()] for _ in range(2)]
    projections = [Projection(torch.randn(O, I).to(dtype), None, *pair, scaling=0.5) for pair in pairs]
    return x, torch.rand(I).to(dtype) + 0.5, projections, [x, *pairs[0], *pairs[1]]


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def fast(x: Tensor, weight: Tensor, projections: list[Projection]) -> Tensor:
    return sum((y * y).sum() for y in adapted_projections(rms_norm(x, weight, 1e-5), projections))


def plain(x: Tensor, weight: Tensor, projections: list[Projection]) -> Tensor:
    return sum((y * y).sum() for y in adapted_projections_plain(rms_norm_plain(x, weight, 1e-5), projections))


def test_gradients_behind_a_norm_are_those_of_the_plain_expression() -> None:
    x, weight, projections, leaves = made()
    wanted = gradients(plain(x, weight, projections), leaves)
    for found, want in zip(gradients(fast(x, weight, projections), leaves), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-12)


def test_gradients_under_checkpointing_are_the_same_bits() -> None:
    x, weight, projections, leaves = made()
    wanted = gradients(fast(x, weight, projections), leaves)
    again = gradients(checkpoint(fast, x, weight, projections, use_reentrant=False), leaves)
    assert all(torch.equal(found, want) for found, want in zip(again, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norms_output_is_not_kept(dtype: torch.dtype) -> None:
    x, weight, projections, _ = made(dtype)
    kept: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        normed = rms_norm(x, weight, 1e-5)
        outputs = adapted_projections(normed, projections)
    assert normed.untyped_storage().data_ptr() not in kept
    assert x.untyped_storage().data_ptr() in kept
    assert outputs[0].requires_grad


@pytest.mark.parametrize("behind_its_back", [False, True])
def test_a_norms_output_cannot_be_changed_unnoticed(behind_its_back: bool) -> None:
    x, weight, projections, _ = made()
    normed = rms_norm(x, weight, 1e-5)

    def change_and_use() -> None:
        (normed.detach() if behind_its_back else normed).mul_(2.0)
        adapted_projections(normed, projections)

    with pytest.raises(RuntimeError, match="inplace"):
        change_and_use()
