"""DoRA's magnitude applied to the output of an adapted layer, as one node of the graph.

    y = (m/n) (z - b) + b        z = x (W + scaling * B A)^T + b, from `adapted_projections`

Saved for the backward pass: z. What is wider than z, as the magnitude of a 16-bit model is, is formed a block of rows at a time.

Shape letters: N tokens, O out_features.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.core.dora import dora_scale

BLOCK_BYTES = 2**18
"""Of a block of rows in float32: a few of them stay in a core's cache."""


def rescaled_plain(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None) -> Tensor:
    """The plain expression that `rescaled` equals."""
    scale = dora_scale(magnitude, norm.detach())
    y = z * scale
    return (y if bias is None else y + (1 - scale) * bias).to(z.dtype)


def rescaled(z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return (m/n) (z - b) + b for z (..., O) in z's dtype; magnitude, norm and bias (O,).

    Gradients go to z and to the magnitude, never to norm and bias. Where m/n is 1, y is z bit for bit.
    """
    y: Tensor = _Rescaled.apply(z, magnitude, norm, bias)
    return y


class _Rescaled(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, magnitude, norm, bias)
        scale = dora_scale(magnitude, norm)
        offset = torch.zeros_like(scale) if bias is None else (1 - scale) * bias
        if z.dtype == scale.dtype:
            return torch.addcmul(offset, z, scale)
        y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        for z_NO, y_NO in _blocks(z, y):
            y_NO.copy_(torch.addcmul(offset, z_NO.to(scale.dtype), scale))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, magnitude, norm, bias = ctx.saved_tensors
        scale = dora_scale(magnitude, norm)
        d_scale = torch.zeros_like(scale)
        dz = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        for z_NO, dy_NO, dz_NO in _blocks(z, dy, dz):
            dy_NO = dy_NO.to(scale.dtype)
            dz_NO.copy_(dy_NO * scale)
            u_NO = z_NO.to(scale.dtype) if bias is None else z_NO - bias.to(scale.dtype)
            d_scale += (dy_NO * u_NO).sum(dim=0)
        return dz, dora_scale(d_scale, norm).to(magnitude.dtype), None, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the same rows of tensors (..., O) as (N, O), a block at a time."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors]
    step = max(1, BLOCK_BYTES // (4 * max(1, rows[0].shape[1])))
    if rows[0].is_meta:
        step = max(step, len(rows[0]) // 8)  # what one block holds shows in a few as well
    yield from zip(*(tensor.split(step) for tensor in rows), strict=True)
