"""The log-probability of each label, straight from the hidden states: the head's logits never exist all at once.

    log_prob_k = z_k[target_k] - logsumexp(z_k),    z = hidden W^T + b + s hidden A^T B^T

A loss over preferences or rewards weighs every position by itself, and the weights come last. With a frozen head the gradient of
each position's hidden state (one-hot minus softmax, times W) is formed with its logits and scaled by its own weight on the way
back: no logits are kept, none is formed twice. A pair on the head learns from sums over positions, which need the weights first,
so there the logits are formed a second time, chunk by chunk.

Shape letters: K labelled positions, I width of the hidden states, V vocabulary, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.ops.cross_entropy import HeadProducts, chunks, head_arguments
from luthier.ops.projection import Projection, adapted_projections_plain


def labelled_log_probs_plain(hidden: Tensor, targets: Tensor, head: Projection) -> Tensor:
    """The plain expression that `labelled_log_probs` equals."""
    (logits,) = adapted_projections_plain(hidden, [head])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def labelled_log_probs(hidden: Tensor, targets: Tensor, head: Projection, *, products: torch.dtype | None = None) -> Tensor:
    """Return the log-probability (nats) of each of `targets` (K,) under the head's logits for `hidden` (K, I): (K,), in float32
    at least.

    The head's weight and bias are frozen; its pair learns. Its dropout must be 0 here, since masks are not kept over chunks.
    `products` as in `adapted_projections`.
    """
    found: Tensor = _LabelledLogProbs.apply(hidden, targets, *head_arguments(hidden, head, products))
    return found


class _LabelledLogProbs(Function):
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
        head = HeadProducts(weight, bias, lora_A, lora_B, scaling, products)
        log_probs = hidden.new_empty(len(hidden), dtype=torch.promote_types(products, torch.float32))
        learns = wanted and any(ctx.needs_input_grad[-2:])
        d_hidden = torch.empty_like(hidden) if wanted and not learns else None
        log_sums = torch.empty_like(log_probs) if learns else None
        for rows in chunks(len(hidden), len(weight)):
            target = targets[rows, None]
            z, _ = head.logits(hidden[rows].to(products))
            of_target, highest = z.gather(1, target), z.amax(dim=-1, keepdim=True)
            sums = z.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            log_sum = sums.log() + highest
            log_probs[rows] = (of_target - log_sum).squeeze(1)
            if log_sums is not None:
                log_sums[rows] = log_sum.squeeze(1)
            if d_hidden is not None:
                head.back(_less_one_hot(z.div_(sums), target).neg_().to(products), d_hidden[rows])
        ctx.constants, ctx.learns = constants, learns
        ctx.save_for_backward(*((hidden, targets, log_sums, weight, bias, lora_A, lora_B) if learns else (d_hidden,)))
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if not ctx.learns:
            (d_hidden,) = ctx.saved_tensors
            return d_hidden * upstream[:, None].to(d_hidden.dtype), None, None, None, None, None, None
        hidden, targets, log_sums, weight, bias, lora_A, lora_B = ctx.saved_tensors
        scaling, products, _ = ctx.constants
        head = HeadProducts(weight, bias, lora_A, lora_B, scaling, products)
        d_hidden = torch.empty_like(hidden)
        d_A, d_B = (torch.zeros_like(factor, dtype=upstream.dtype) for factor in (lora_A, lora_B))
        for rows in chunks(len(hidden), len(weight)):
            x = hidden[rows].to(products)
            z, h = head.logits(x)
            shares = z.sub_(log_sums[rows, None]).exp_()
            d_z = _less_one_hot(shares, targets[rows, None]).mul_(-upstream[rows, None]).to(products)
            d_h = head.back(d_z, d_hidden[rows])
            d_A += d_h.T @ x
            d_B += d_z.T @ h
        return d_hidden, None, None, None, None, d_A.to(lora_A.dtype), d_B.mul_(scaling).to(lora_B.dtype)


def _less_one_hot(shares: Tensor, target: Tensor) -> Tensor:
    """Take 1 from each row's entry at its target, in place."""
    return shares.scatter_add_(1, target, shares.new_full((), -1.0).expand_as(target))
