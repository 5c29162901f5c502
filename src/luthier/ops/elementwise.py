"""RMS norm, rotary positions and the gate of a gated MLP: cheap in arithmetic, dear in memory traffic.

Each saves its input (or nothing) and forms the rest again in the backward pass.

Shape letters: N tokens, F features, H heads, D head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.ops.compiler import Kernel


def rms_norm_plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The plain expression that `rms_norm` equals: x / rms(x) in float32 at least, rounded to x's dtype, times weight."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last axis; x (..., F), weight (F,) frozen.

    Source: Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv:1910.07467, equation 4.
    """
    output, scale = _RmsNorm.apply(x, weight, eps)
    if output.requires_grad:
        output.origin = Origin((x.detach(), scale, weight), _normed)
    return cast(Tensor, output)


@Kernel
def _rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), scale


@Kernel
def _rms_norm_again(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return weight * (x.to(scale.dtype) * scale).to(x.dtype)


@Kernel
def _rms_norm_backward(dy: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    normed = x.to(scale.dtype) * scale
    d_normed = dy.to(scale.dtype) * weight
    return (scale * (d_normed - normed * (d_normed * normed).mean(-1, keepdim=True))).to(x.dtype)


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y_NF, scale_N1 = _rms_norm_forward(x.reshape(-1, x.shape[-1]), weight, eps)
        ctx.save_for_backward(x, weight, scale_N1)
        ctx.mark_non_differentiable(scale_N1)
        return y_NF.view_as(x), scale_N1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
        x, weight, scale_N1 = ctx.saved_tensors
        dx_NF = _rms_norm_backward(dy.reshape(-1, x.shape[-1]), x.reshape(-1, x.shape[-1]), scale_N1, weight)
        return dx_NF.view_as(x), None, None


@dataclass(frozen=True)
class Origin:
    """What a backward pass may keep instead of a tensor: `again(tensors)` is the tensor, formed anew."""

    tensors: tuple[Tensor, ...]
    again: Callable[..., Tensor]

    @property
    def is_kept_anyway(self) -> bool:
        """Whether something else keeps the tensors, so that they cost nothing."""
        return self.again is not _itself


def origin_of(x: Tensor) -> Origin:
    """Return what to keep of `x`: for a norm's output what the norm keeps anyway, else `x` itself.

    A norm's output cannot have been changed since: autograd refuses that for what a node of several outputs returned.
    """
    origin = getattr(x, "origin", None)
    return origin if isinstance(origin, Origin) else Origin((x,), _itself)


def _itself(x: Tensor) -> Tensor:
    return x


def _normed(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return _rms_norm_again(x.reshape(-1, x.shape[-1]), scale, weight).view_as(x)


def rotate_plain(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The plain expression that `rotate` equals."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos.unsqueeze(-2) + torch.cat((-right, left), dim=-1) * sin.unsqueeze(-2)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the halves of each head by its token's angles; heads (N, H, D), cos and sin (N, D). Saves nothing of heads.

    Source: Su et al. 2021, RoFormer, arXiv:2104.09864, equation 34, with the pairs D/2 apart as transformers stores them.
    """
    output: Tensor = _Rotate.apply(heads, cos, sin)
    return output


@Kernel
def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotate_plain(heads, cos, sin)


@Kernel
def _rotate_back(d_heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = (d_heads * sin.unsqueeze(-2)).chunk(2, dim=-1)
    return d_heads * cos.unsqueeze(-2) + torch.cat((right, -left), dim=-1)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_heads: Tensor) -> tuple[Any, ...]:
        cos, sin = ctx.saved_tensors
        return _rotate_back(d_heads, cos, sin), None, None


@Kernel
def gate(gates: Tensor, up: Tensor) -> Tensor:
    """Return silu(gates) * up. Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202, equation 6 (SwiGLU)."""
    return F.silu(gates) * up


@Kernel
def gate_backward(d_gated: Tensor, gates: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of gates and up from that of `gate`."""
    # torch's own derivative of silu: one pass, rounded once, where the product of its factors would be rounded at each.
    return torch.ops.aten.silu_backward(d_gated * up, gates), d_gated * F.silu(gates)
