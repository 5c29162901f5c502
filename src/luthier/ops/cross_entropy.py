"""The loss at the labelled positions, straight from the hidden states: the head's logits never exist all at once.

    loss = sum_k [ logsumexp(z_k) - z_k[target_k] ],    z = hidden W^T + b + s hidden A^T B^T

Chunk by chunk, logits are formed, turned into the gradient that they need (softmax minus one-hot), multiplied back, and dropped.
The gradient of the sum is therefore known when the forward pass ends, and the backward pass only scales it. Where each position
has a gradient of its own to come (preferences, rewards), `luthier.ops.log_probs` does the same without adding up.

Shape letters: K labelled positions, I width of the hidden states, V vocabulary, R rank.
"""

from collections.abc import Iterator
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
    loss: Tensor = _LabelledCrossEntropy.apply(hidden, targets, *head_arguments(hidden, head, products))
    return loss


def head_arguments(hidden: Tensor, head: Projection, products: torch.dtype | None) -> tuple[Any, ...]:
    """Return what a function of a head's logits is applied to besides hidden states and targets.

    These are (scaling, dtype of the products, whether a gradient will be asked for), weight, bias, lora_A and lora_B.
    """
    assert not head.dropout
    wanted = hidden.requires_grad or any(pair is not None and pair.requires_grad for pair in (head.lora_A, head.lora_B))
    constants = (head.scaling, products or hidden.dtype, wanted and torch.is_grad_enabled())
    return constants, head.weight, head.bias, head.lora_A, head.lora_B


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
        head = HeadProducts(weight, bias, lora_A, lora_B, scaling, products)
        d_hidden = torch.empty_like(hidden) if wanted else None
        learns_A, learns_B = (wanted and learns for learns in ctx.needs_input_grad[-2:])
        d_A = torch.zeros_like(lora_A, dtype=wide) if learns_A else None  # type: ignore[arg-type]
        d_B = torch.zeros_like(lora_B, dtype=wide) if learns_B else None  # type: ignore[arg-type]
        for rows in chunks(len(hidden), len(weight)):
            x, target = hidden[rows].to(products), targets[rows, None]
            z, h = head.logits(x)
            # All in the memory of the logits: logsumexp would take as much again, and its exponentials are needed below.
            of_target, highest = z.gather(1, target), z.amax(dim=-1, keepdim=True)
            sums = z.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            total += (sums.log() + highest - of_target).sum(dtype=torch.float64)
            if d_hidden is None:
                continue
            d_z = z.div_(sums).scatter_add_(1, target, z.new_full((), -1.0).expand_as(target)).to(products)
            d_h = head.back(d_z, d_hidden[rows])
            if d_A is not None:
                d_A += d_h.T @ x
            if d_B is not None:
                d_B += d_z.T @ h
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


class HeadProducts:
    """An output layer, the products with it in one dtype: logits of a chunk of hidden states, and gradients back through them."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        products: torch.dtype,
    ) -> None:
        self.weight, self.bias, self.products = weight, bias, products
        self.A_RI = None if lora_A is None else lora_A.to(products)
        self.B_VR = None if lora_B is None else torch.mul(lora_B, scaling).to(products)

    def logits(self, x_KI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (K, V) of a chunk, in float32 at least, and x A^T (K, R; of no width without a pair)."""
        z = x_KI.new_empty(len(x_KI), len(self.weight))
        for entries, weight_VI in row_slices(self.weight, self.products):
            torch.mm(x_KI, weight_VI.T, out=z[:, entries])
        if self.bias is not None:
            z += self.bias
        h = x_KI.new_empty(len(x_KI), 0)
        if self.A_RI is not None and self.B_VR is not None:
            h = x_KI @ self.A_RI.T
            z.addmm_(h, self.B_VR.T)
        return z.to(torch.promote_types(self.products, torch.float32)), h

    def back(self, d_z_KV: Tensor, d_hidden_KI: Tensor) -> Tensor:
        """Write the gradient of the hidden states into `d_hidden_KI`, and return that of x A^T."""
        is_wide_enough = d_hidden_KI.dtype == self.products
        d_x = d_hidden_KI if is_wide_enough else torch.empty_like(d_hidden_KI, dtype=self.products)
        for entries, weight_VI in row_slices(self.weight, self.products):
            torch.addmm(d_x, d_z_KV[:, entries], weight_VI, beta=int(entries.start > 0), out=d_x)
        d_h = d_z_KV.new_empty(len(d_z_KV), 0)
        if self.A_RI is not None and self.B_VR is not None:
            d_h = d_z_KV @ self.B_VR
            d_x.addmm_(d_h, self.A_RI)
        if not is_wide_enough:
            d_hidden_KI.copy_(d_x)
        return d_h


def chunks(count: int, vocabulary: int) -> Iterator[slice]:
    """Yield slices of `count` positions, each of which has logits of CHUNK_BYTES at most (or is one position)."""
    step = max(1, min(count, CHUNK_BYTES // (4 * vocabulary)))
    for start in range(0, count, step):
        yield slice(start, start + step)
