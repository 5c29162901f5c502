"""Adapted projections: frozen linear layers that read the same x, each with its low-rank part, as one node of the graph.

    y_i = x W_i^T + b_i + scaling_i * drop_i(x) A_i^T B_i^T

Saved for the backward pass: the rank-wide x A^T, and x once for all of them, which only the gradient of A needs. Not even that
where no A learns, or where x is a norm's output: the norm keeps its own input, from which x is formed again. The low-rank part
is added into the base product, one product with all A stacked serves the whole group, and dx is summed up in one buffer.

Shape letters: N tokens, I in_features, O out_features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.core.lora import lora_linear
from luthier.ops.elementwise import Origin, origin_of
from luthier.ops.packed import dense
from luthier.ops.scratch import scratch, widened


@dataclass(frozen=True, slots=True)
class Projection:
    """A frozen linear layer, weight (O, I) and bias (O,), and its pair lora_A (R, I), lora_B (O, R); without a pair both None.

    `scaling` is that of the pair; `dropout` the share of x the pair does not see.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0


def adapted_projections_plain(x: Tensor, projections: Sequence[Projection]) -> tuple[Tensor, ...]:
    """The plain expression that `adapted_projections` equals."""
    outputs = []
    for each in projections:
        y = F.linear(x, each.weight, each.bias)
        if each.lora_A is not None and each.lora_B is not None:
            y = y + lora_linear(F.dropout(x, each.dropout), each.lora_A, each.lora_B, each.scaling).to(y.dtype)
        outputs.append(y)
    return tuple(outputs)


def adapted_projections(
    x: Tensor, projections: Sequence[Projection], *, products: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """Return y_i for each projection of x (..., I): a tuple of (..., O_i) in x's dtype.

    Gradients go to x and to the factors that require them, never to weights and biases: those must be frozen. The pairs may be
    in a wider dtype; they are cast to x's, their gradients come back in their own. With `products` all is multiplied and added
    up in that dtype (see `luthier.ops.products`) and rounded to x's once.
    """
    constants = constants_of(projections, products or x.dtype)
    tensors = [tensor for each in projections for tensor in (each.weight, each.bias, each.lora_A, each.lora_B)]
    outputs: tuple[Tensor, ...] = _AdaptedProjections.apply(x, constants, origin_of(x), *tensors)
    return outputs


def merging_is_cheaper(num_tokens: int, out_features: int, in_features: int, dtype: torch.dtype) -> bool:
    """Whether x (W + s B A)^T takes fewer multiplications than x W^T + s x A^T B^T, forward and backward together.

    Forming B A costs R I O in each pass, the thin products N R (I + O) forward and N R I backward for dx (the rest is the
    same). Never in 16 bits, where the sum of weight and delta would be rounded before it is used.
    Source: Cherniuk et al. 2023, RunLoRA, arXiv:2312.03415, section 3.
    """
    if dtype not in (torch.float32, torch.float64):
        return False
    return num_tokens * (2 * in_features + out_features) > 2 * in_features * out_features


class _AdaptedProjections(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: "Constants", origin: Origin, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x_NI = x.reshape(-1, x.shape[-1])
        parts = to_parts(constants, tensors, len(x_NI))
        keeps_x = origin.is_kept_anyway or any(part.learns_A for part in parts)
        outputs = project(x_NI, parts, keeps_x=keeps_x)
        kept = origin.tensors if keeps_x else ()
        ctx.constants, ctx.again, ctx.kept = constants, origin.again, len(kept)
        ctx.save_for_backward(*kept, *tensors, *to_keep(parts, need_dx=ctx.needs_input_grad[0]))
        return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        count, saved = len(upstream), ctx.saved_tensors
        kept, saved = saved[: ctx.kept], saved[ctx.kept :]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in upstream]
        parts = to_parts(ctx.constants, saved[: 4 * count], len(dys[0]), saved[4 * count :])
        x = ctx.again(*kept) if any(part.needs_x for part in parts) else None
        dx = project_back(None if x is None else x.reshape(-1, x.shape[-1]), parts, dys, need_dx=ctx.needs_input_grad[0])
        pairs = (each for part in parts for each in (None, None, part.d_a, part.d_b))
        return None if dx is None else dx.view(*upstream[0].shape[:-1], dx.shape[-1]), None, None, *pairs


def project(x_NI: Tensor, parts: Sequence["Part"], *, keeps_x: bool) -> list[Tensor]:
    """Return the outputs (N, O_i) in x's dtype; fills in `h` and `mask` of the parts that need them. `keeps_x` says whether x
    is there on the way back.
    """
    dtype, products = x_NI.dtype, parts[0].products
    x_NI = widened("x", x_NI, products)
    for part in parts:
        if part.lora_A is not None and part.dropout:
            # Drawn as F.dropout draws it, so that one seed drops the same; a byte a number is kept instead of a copy of x.
            part.mask = torch.empty_like(x_NI).bernoulli_(1 - part.dropout).bool()
            part.h = part.dropped(x_NI) @ part.a().T
    # A merged part needs h for B's gradient only, and forms it on the way back if it can.
    sharing = [part for part in parts if part.lora_A is not None and part.mask is None]
    _share_h([part for part in sharing if not part.is_merged or (part.learns_B and not keeps_x)], x_NI)
    outputs = []
    for part in parts:
        if dtype == products:
            y = F.linear(x_NI, part.used_weight(), part.bias)
        else:
            y = scratch("y", (len(x_NI), len(part.weight)), products, x_NI.device)
            torch.mm(x_NI, part.used_weight().T, out=y)
            if part.bias is not None:
                y += part.bias
        if part.h is not None and not part.is_merged:
            y.addmm_(part.h, part.b().T)
        outputs.append(y.to(dtype))
    return outputs


def to_keep(parts: Sequence["Part"], *, need_dx: bool) -> list[Tensor | None]:
    """Return the h of each part and then the mask of each, None in the place of what the way back does without."""
    hs = [part.h if part.learns_B else None for part in parts]
    return hs + [part.mask if part.learns_A or need_dx else None for part in parts]


def project_back(x_NI: Tensor | None, parts: Sequence["Part"], dys: Sequence[Tensor], *, need_dx: bool) -> Tensor | None:
    """Return dx (N, I) if it is needed; fills in `d_a` and `d_b` of the parts that learn. x_NI is for those that need it."""
    dtype, products = dys[0].dtype, parts[0].products
    dys = [widened(f"dy {index}", dy_NO, products) for index, dy_NO in enumerate(dys)]
    dx: Tensor | None = None
    if need_dx:
        shape = (len(dys[0]), parts[0].weight.shape[1])
        # What is rounded afterwards is needed for a moment only.
        dx = dys[0].new_empty(shape) if dtype == products else scratch("dx", shape, products, dys[0].device)
        for index, (part, dy_NO) in enumerate(zip(parts, dys, strict=True)):
            torch.addmm(dx, dy_NO, part.used_weight(), beta=int(index > 0), out=dx)
    if x_NI is not None:
        x_NI = widened("x", x_NI, products)
        _share_h([part for part in parts if part.needs_h], x_NI)
    sharing, d_hs = [], []
    for part, dy_NO in zip(parts, dys, strict=True):
        if part.learns_B:
            assert part.h is not None and part.lora_B is not None
            part.d_b = (dy_NO.T @ part.h).to(part.lora_B.dtype) * part.scaling
        passes_back = dx is not None and part.lora_A is not None and not part.is_merged
        if not part.learns_A and not passes_back:
            continue
        d_h = dy_NO @ part.b()
        if not part.dropout:
            sharing.append(part)
            d_hs.append(d_h)
            continue
        if part.learns_A:
            assert part.lora_A is not None and x_NI is not None
            part.d_a = (d_h.T @ part.dropped(x_NI)).to(part.lora_A.dtype)
        if dx is not None:
            assert part.mask is not None
            dx.add_((d_h @ part.a()).mul_(part.mask), alpha=1 / (1 - part.dropout))
    learning = [index for index, part in enumerate(sharing) if part.learns_A]
    apart = [index for index, part in enumerate(sharing) if dx is not None and not part.is_merged]
    if learning:
        assert x_NI is not None
        d_h = torch.cat([d_hs[index] for index in learning], dim=1)
        for index, d_a in zip(learning, (d_h.T @ x_NI).split([sharing[index].r for index in learning]), strict=True):
            sharing[index].d_a = d_a.to(sharing[index].lora_A.dtype)  # type: ignore[union-attr]
    if dx is not None and apart:
        if apart != learning:
            d_h = torch.cat([d_hs[index] for index in apart], dim=1)
        dx.addmm_(d_h, _stacked_a([sharing[index] for index in apart]))
    return None if dx is None else dx.to(dtype)


class Constants(NamedTuple):
    """What a node knows of its projections besides their tensors: the dtype of products, and of each pair the scaling, the
    dropout, and whether lora_A and lora_B learn.
    """

    products: torch.dtype
    pairs: tuple[tuple[float, float, bool, bool], ...]


@dataclass(slots=True)
class Part:
    """One projection inside the node: its tensors and what was formed of them so far."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    scaling: float
    dropout: float
    learns_A: bool
    learns_B: bool
    is_merged: bool
    products: torch.dtype
    h: Tensor | None = None
    """x A^T, (N, R)"""
    mask: Tensor | None = None
    d_a: Tensor | None = None
    d_b: Tensor | None = None

    @property
    def r(self) -> int:
        """The pair's rank."""
        assert self.lora_A is not None
        return self.lora_A.shape[0]

    @property
    def needs_h(self) -> bool:
        """Whether h is still to be formed, on the way back."""
        return self.learns_B and self.h is None

    @property
    def needs_x(self) -> bool:
        """Whether x is needed on the way back."""
        return self.learns_A or self.needs_h

    def a(self) -> Tensor:
        """lora_A in the dtype of the products, (R, I)."""
        assert self.lora_A is not None
        return self.lora_A.to(self.products)

    def b(self) -> Tensor:
        """scaling * lora_B, (O, R): scaled in the masters' dtype, on the smallest matrix there is."""
        assert self.lora_B is not None
        return (self.lora_B * self.scaling).to(self.products)

    def used_weight(self) -> Tensor:
        """weight, or weight + scaling * B A where that is cheaper, (O, I); good until the next call of any part."""
        weight = widened("weight", dense(self.weight), self.products)
        if not self.is_merged:
            return weight
        # In the weight's own layout: from the other one BLAS adds up in another order, and a fresh pair would change last bits.
        is_turned = weight.T.is_contiguous() and not weight.is_contiguous()
        shape = tuple(weight.T.shape if is_turned else weight.shape)
        merged = scratch("merged", shape, self.products, weight.device)
        return torch.addmm(weight, self.b(), self.a(), out=merged.T if is_turned else merged)

    def dropped(self, x_NI: Tensor) -> Tensor:
        """What the pair sees of x, (N, I)."""
        assert self.mask is not None
        return (x_NI * self.mask).div_(1 - self.dropout)


def constants_of(projections: Sequence[Projection], products: torch.dtype) -> Constants:
    """Return what a node of these projections knows besides their tensors. A factor learns if it requires a gradient now."""
    pairs = []
    for each in projections:
        learns_A, learns_B = (factor is not None and factor.requires_grad for factor in (each.lora_A, each.lora_B))
        pairs.append((each.scaling, each.dropout, learns_A, learns_B))
    return Constants(products, tuple(pairs))


def to_parts(constants: Constants, tensors: Sequence[Any], num_tokens: int, kept: Sequence[Any] = ()) -> list[Part]:
    """Return the projections of a node as parts; `tensors` are weight, bias, lora_A and lora_B of each in turn, `kept` what
    `to_keep` gave.
    """
    parts = []
    for index, (scaling, dropout, learns_A, learns_B) in enumerate(constants.pairs):
        weight, bias, lora_A, lora_B = tensors[4 * index : 4 * index + 4]
        out_features, in_features = weight.shape
        can_merge = lora_A is not None and not dropout
        is_merged = can_merge and merging_is_cheaper(num_tokens, out_features, in_features, constants.products)
        part = Part(weight, bias, lora_A, lora_B, scaling, dropout, learns_A, learns_B, is_merged, constants.products)
        if kept:
            part.h, part.mask = kept[index], kept[len(constants.pairs) + index]
        parts.append(part)
    return parts


def _share_h(parts: Sequence[Part], x_NI: Tensor) -> None:
    """Give each part its x A^T out of one product with all of their A stacked."""
    if parts:
        stacked = x_NI @ _stacked_a(parts).T
        for part, h in zip(parts, stacked.split([part.r for part in parts], dim=1), strict=True):
            part.h = h


def _stacked_a(parts: Sequence[Part]) -> Tensor:
    return torch.cat([part.a() for part in parts]) if len(parts) > 1 else parts[0].a()
