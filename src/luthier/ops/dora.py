"""DoRA's magnitude applied to the output of an adapted layer, as one node of the graph.

    y = (m/n) (z - b) + b        z = x (W + scaling * B A)^T + b, from `adapted_projections`

Saved for the backward pass: z. What is wider than z, as the magnitude of a 16-bit model is, is formed a block of rows at a time
or inside a compiled loop.

Shape letters: N tokens, O out_features.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.core.dora import dora_scale
from luthier.ops.compiler import Kernel


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


@Kernel
def _rescale(z: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.addcmul(offset, z.to(scale.dtype), scale).to(z.dtype)


@Kernel
def _rescale_back(dy: Tensor, z: Tensor, scale: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return dz and the gradient of the scale."""
    wide = dy.to(scale.dtype)
    own = z.to(scale.dtype) if bias is None else z - bias.to(scale.dtype)
    return (wide * scale).to(z.dtype), (wide * own).sum(dim=0)


class _Rescaled(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, magnitude, norm, bias)
        scale = dora_scale(magnitude, norm)
        offset = torch.zeros_like(scale) if bias is None else (1 - scale) * bias
        return cast(Tensor, _rescale(z.reshape(-1, z.shape[-1]), scale, offset)).view(z.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        z, magnitude, norm, bias = ctx.saved_tensors
        rows = (each.reshape(-1, z.shape[-1]) for each in (dy, z))
        dz_NO, d_scale = _rescale_back(*rows, dora_scale(magnitude, norm), bias)
        return dz_NO.view(z.shape), dora_scale(d_scale, norm).to(magnitude.dtype), None, None
