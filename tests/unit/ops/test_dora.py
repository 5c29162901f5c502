"""The magnitude's node against float64 autograd of the expression it stands for."""

import pytest
import torch
from torch import Tensor

from luthier.ops.dora import rescaled, rescaled_plain


def numbers(leading: tuple[int, ...], dtype: torch.dtype, bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    z = torch.randn(*leading, 13).to(dtype)
    return z, 0.5 + torch.rand(13), 0.5 + torch.rand(13), torch.randn(13).to(dtype) if bias else None


def in_float64(
    z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y and the gradients of z and the magnitude."""
    z, magnitude = z.detach().double().requires_grad_(), magnitude.detach().double().requires_grad_()
    own = 0.0 if bias is None else bias.double()
    y = magnitude / norm.double() * (z - own) + own
    y.backward(upstream.double())
    return y.detach(), z.grad, magnitude.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (5,), (3, 1, 4), (7001,)])
@pytest.mark.parametrize("one", [rescaled, rescaled_plain])
def test_values_and_gradients_are_those_of_the_expression(one: object, leading: tuple[int, ...], bias: bool) -> None:
    z, magnitude, norm, own = numbers(leading, torch.float32, bias)
    upstream = torch.randn_like(z)
    want = in_float64(z, magnitude, norm, own, upstream)
    z.requires_grad_(), magnitude.requires_grad_()
    y = one(z, magnitude, norm, own)
    y.backward(upstream)
    for found, expected in zip((y, z.grad, magnitude.grad), want, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_round_once(dtype: torch.dtype) -> None:
    """A magnitude a little off its norm counts, though 16 bits could not hold the ratio."""
    z, magnitude, norm, own = numbers((3001,), dtype, True)
    magnitude = norm * 1.0005
    upstream = torch.randn(3001, 13).to(dtype)
    y, dz, d_magnitude = in_float64(z, magnitude, norm, own, upstream)
    z.requires_grad_(), magnitude.requires_grad_()
    found = rescaled(z, magnitude, norm, own)
    found.backward(upstream)
    assert (found.double() - y).abs().max() <= torch.finfo(dtype).eps * y.abs().max()
    assert (found != z).any()
    assert (z.grad.double() - dz).abs().max() <= torch.finfo(dtype).eps * dz.abs().max()
    assert magnitude.grad.dtype == torch.float32
    torch.testing.assert_close(magnitude.grad.double(), d_magnitude, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_magnitude_that_is_the_norm_changes_no_bit(dtype: torch.dtype, bias: bool) -> None:
    z, magnitude, _, own = numbers((31,), dtype, bias)
    assert torch.equal(rescaled(z, magnitude, magnitude.clone(), own), z)


def test_no_tokens_at_all() -> None:
    z, magnitude, norm, _ = numbers((0,), torch.float32, False)
    z.requires_grad_(), magnitude.requires_grad_()
    rescaled(z, magnitude, norm).sum().backward()
    assert z.grad.shape == (0, 13)
    assert magnitude.grad.tolist() == [0.0] * 13


def test_a_row_of_zeros_gets_finite_gradients() -> None:
    z, norm = torch.zeros(4, 13, requires_grad=True), torch.zeros(13)
    magnitude = torch.zeros(13, requires_grad=True)
    rescaled(z, magnitude, norm).sum().backward()
    assert torch.isfinite(magnitude.grad).all()
    assert torch.isfinite(z.grad).all()
