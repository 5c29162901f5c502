"""The second half of a gated MLP as one node: the gate, and the adapted projection that reads it.

    y = P(silu(gates) * up)        P an adapted projection

Saved are gates and up, which the gate needs anyway; what the projection reads is formed again in the backward pass, if at
all.

Shape letters: N tokens, F width of the MLP, O out_features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.ops.elementwise import gate, gate_backward
from luthier.ops.projection import (
    Projection,
    adapted_projections_plain,
    constants_of,
    project,
    project_back,
    to_keep,
    to_parts,
)
from luthier.ops.scratch import scratch


def gated_projection_plain(gates: Tensor, up: Tensor, projection: Projection) -> Tensor:
    """The plain expression that `gated_projection` equals."""
    return adapted_projections_plain(F.silu(gates) * up, [projection])[0]


def gated_projection(gates: Tensor, up: Tensor, projection: Projection, *, products: torch.dtype | None = None) -> Tensor:
    """Return the projection of silu(gates) * up, both (..., F), as (..., O). Weight and bias must be frozen.

    `products` as in `adapted_projections`.
    """
    constants = constants_of([projection], products or gates.dtype)
    tensors = (projection.weight, projection.bias, projection.lora_A, projection.lora_B)
    output: Tensor = _GatedProjection.apply(gates, up, constants, *tensors)
    return output


class _GatedProjection(Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, up: Tensor, constants: Any, *tensors: Tensor | None) -> Tensor:
        x_NF = _gated(gates, up)
        parts = to_parts(constants, tensors, len(x_NF))
        (y,) = project(x_NF, parts, keeps_x=True)
        ctx.constants = constants
        ctx.save_for_backward(gates, up, *tensors, *to_keep(parts, need_dx=True))
        return y.view(*gates.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        gates, up, *tensors, h, mask = ctx.saved_tensors
        dy_NO = dy.flatten(0, -2)
        (part,) = parts = to_parts(ctx.constants, tensors, len(dy_NO), [h, mask])
        dx = project_back(_gated(gates, up) if part.needs_x else None, parts, [dy_NO], need_dx=True)
        assert dx is not None
        d_gates, d_up = gate_backward(dx, gates.flatten(0, -2), up.flatten(0, -2))
        return d_gates.view_as(gates), d_up.view_as(up), None, None, None, part.d_a, part.d_b


def _gated(gates: Tensor, up: Tensor) -> Tensor:
    """Return silu(gates) * up as (N, F), good until the next call."""
    gates_NF, up_NF = gates.flatten(0, -2), up.flatten(0, -2)
    return gate(gates_NF, up_NF, out=scratch("gated", tuple(gates_NF.shape), gates.dtype, gates.device))
