"""The loss at the labelled positions, straight from the hidden states: the head's logits never exist all at once.

    loss = sum_k [ logsumexp(z_k) - z_k[target_k] ],    z = hidden W^T + b + s hidden A^T B^T

Chunk by chunk, logits are formed, turned into the gradient that they need (softmax minus one-hot), multiplied back, and dropped.
The gradient of the sum is therefore known when the forward pass ends, and the backward pass only scales it.

Shape letters: K labelled positions, I width of the hidden states, V vocabulary, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.ops.products import row_slices
from luthier.ops.projection import Projection, adapted_projections_plain

CHUNK_BYTES = 96 * 2**20
"""Of the logits of one chunk, in float32: enough rows for products at nearly their full rate."""


def labelled_cross_entropy_plain(hidden: Tensor, targets: Tensor, head: Projection) -> Tensor:
    """The plain expression that `labelled_cross_entropy` equals."""
    (logits,) = adapted_projections_plain(hidden, [head])
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")


def labelled_cross_entropy(hidden: Tensor, targets: Tensor, head: Projection, *, products: torch.dtype | None = None) -> Tensor:
    """Return the summed cross entropy (nats) of `targets` (K,) under the head's logits for `hidden` (K, I), in float32 at least.

    The head's weight and bias are frozen; its pair learns. Its dropout must be 0 here, since masks are not kept over chunks.
    `products` as in `adapted_projections`.
    """
    assert not head.dropout
    wanted = hidden.requires_grad or any(pair is not None and pair.requires_grad for pair in (head.lora_A, head.lora_B))
    constants = (head.scaling, products or hidden.dtype, wanted and torch.is_grad_enabled())
    loss: Tensor = _LabelledCrossEntropy.apply(hidden, targets, constants, head.weight, head.bias, head.lora_A, head.lora_B)
    return loss


class _LabelledCrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        constants: tuple[float, torch.dtype, bool],
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
    ) -> Tensor:
        scaling, products, wanted = constants
        wide = torch.promote_types(products, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wanted else None
        has_pair = lora_A is not None and lora_B is not None
        A_RI = lora_A.to(products) if has_pair else None  # type: ignore[union-attr]
        B_VR = torch.mul(lora_B, scaling).to(products) if has_pair else None  # type: ignore[arg-type]
        learns_A, learns_B = (wanted and has_pair and learns for learns in ctx.needs_input_grad[-2:])
        d_A = torch.zeros_like(lora_A, dtype=wide) if learns_A else None  # type: ignore[arg-type]
        d_B = torch.zeros_like(lora_B, dtype=wide) if learns_B else None  # type: ignore[arg-type]
        chunk = max(1, min(len(hidden), CHUNK_BYTES // (4 * weight.shape[0])))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            x, target = hidden[rows].to(products), targets[rows, None]
            z = x.new_empty(len(x), len(weight))
            for entries, weight_VI in row_slices(weight, products):
                torch.mm(x, weight_VI.T, out=z[:, entries])
            if bias is not None:
                z += bias
            if A_RI is not None and B_VR is not None:
                h = x @ A_RI.T
                z.addmm_(h, B_VR.T)
            z = z.to(wide)
            # All in the memory of the logits: logsumexp would take as much again, and its exponentials are needed below.
            of_target, highest = z.gather(1, target), z.amax(dim=-1, keepdim=True)
            sums = z.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() + highest - of_target).sum(dtype=torch.float64)
            if d_hidden is None:
                continue
            d_z = z.div_(sums).scatter_add_(1, target, z.new_full((), -1.0).expand_as(target)).to(products)
            is_wide_enough = d_hidden.dtype == products
            d_x = d_hidden[rows] if is_wide_enough else torch.empty_like(x)
            for entries, weight_VI in row_slices(weight, products):
                torch.addmm(d_x, d_z[:, entries], weight_VI, beta=int(entries.start > 0), out=d_x)
            if A_RI is not None and B_VR is not None:
                d_h = d_z @ B_VR
                d_x.addmm_(d_h, A_RI)
                if d_A is not None:
                    d_A += d_h.T @ x
                if d_B is not None:
                    d_B += d_z.T @ h
            if not is_wide_enough:
                d_hidden[rows] = d_x
        ctx.save_for_backward(
            d_hidden,
            None if d_A is None else d_A.to(lora_A.dtype),  # type: ignore[union-attr]
            None if d_B is None else d_B.mul_(scaling).to(lora_B.dtype),  # type: ignore[union-attr]
        )
        return total.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        d_hidden, d_A, d_B = (None if each is None else each * upstream.to(each.dtype) for each in ctx.saved_tensors)
        return d_hidden, None, None, None, None, d_A, d_B
