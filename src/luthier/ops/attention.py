"""Causal attention inside each document of a packed batch, and never across.

Shape letters: N tokens of all documents, H query heads, K key heads (H is a multiple of K), D head width; in a group of
documents b rows of L tokens.

Where products are formed in float32 or float64 it is done here, in blocks of queries that see the keys up to their own end:
plain batched products at their full rate, without the half of the square that is masked anyway, the heads that share keys in
one product. Only q, k, v and the output are kept; weights are formed again in the backward pass. Where products are formed in 16
bits a score must not be rounded before the softmax, so torch's own kernel is asked, group by group.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from luthier.ops.documents import DocumentGroup, Documents
from luthier.ops.placement import device_kind
from luthier.ops.products import fast_products

BLOCK = 64
"""Queries in one block, where a document has more than twice as many tokens."""
SCORE_BYTES = 2**21
"""Of the scores that are there at once, where one matrix of a block needs no more."""
LONGEST_BLOCKED = 2048
"""Above this torch's own kernel wins: it tiles keys too, so the scores stay in the cache."""


def document_attention_plain(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """The plain expression that `document_attention` equals: one document at a time, the whole square of scores."""
    outputs = []
    share = q.shape[1] // k.shape[1]
    for part in zip(*(tensor.split(documents.lengths) for tensor in (q, k, v)), strict=True):
        q_HLD, k_KLD, v_KLD = (tensor.transpose(0, 1) for tensor in part)
        scores_HLL = q_HLD @ k_KLD.repeat_interleave(share, 0).mT * scale
        future = torch.ones(scores_HLL.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        weights_HLL = scores_HLL.masked_fill(future, float("-inf")).softmax(-1)
        outputs.append((weights_HLL @ v_KLD.repeat_interleave(share, 0)).transpose(0, 1))
    return torch.cat(outputs)


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v inside each document, each token seeing itself and what came before it there.

    Shapes: q (N, H, D), k and v (N, K, D) -> (N, H, D).
    """
    longest = max(group.length for group in documents.groups)
    if is_blocked(q, longest) and not q.is_meta:
        output: Tensor = _BlockedAttention.apply(q, k, v, documents, scale, fast_products(q))
        return output
    parts = []
    for group in documents.groups:
        q_bHLD, k_bKLD, v_bKLD = (group.take(tensor).transpose(1, 2) for tensor in (q, k, v))
        is_grouped = q.shape[1] != k.shape[1]
        o_bHLD = F.scaled_dot_product_attention(q_bHLD, k_bKLD, v_bKLD, is_causal=True, scale=scale, enable_gqa=is_grouped)
        parts.append(group.put_back(o_bHLD.transpose(1, 2)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def is_blocked(q: Tensor, longest: int) -> bool:
    """Return whether attention of queries like `q`, in documents of up to `longest` tokens, is done here in blocks."""
    products = fast_products(q)
    return products in (torch.float32, torch.float64) and device_kind(q.device) == "cpu" and longest <= LONGEST_BLOCKED


class _BlockedAttention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, products: torch.dtype) -> Tensor:
        output, share = q.new_empty(q.shape), q.shape[1] // k.shape[1]
        for group in documents.groups:
            # Queries lie token by token with the heads of one key head side by side, so a block of tokens is a slice.
            q_gMD = _queries(group, q, k.shape[1], products).mul_(scale)
            k_gLD, v_gLD = _keys(group, k, products), _keys(group, v, products)
            o_gMD = torch.empty_like(q_gMD)
            for few, rows, end in _blocks(group.length, share, q_gMD):
                torch.bmm(_weights(q_gMD[few, rows], k_gLD[few, :end], share), v_gLD[few, :end], out=o_gMD[few, rows])
            output[group.start : group.stop] = _tokens(group, o_gMD, q)
        ctx.documents, ctx.scale, ctx.products = documents, scale, products
        ctx.save_for_backward(q, k, v, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        q, k, v, output = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        heads, share = k.shape[1], q.shape[1] // k.shape[1]
        for group in ctx.documents.groups:
            q_gMD, do_gMD, o_gMD = (_queries(group, each, heads, ctx.products) for each in (q, upstream, output))
            k_gLD, v_gLD = _keys(group, k, ctx.products), _keys(group, v, ctx.products)
            q_gMD.mul_(ctx.scale)
            row_sums_gM1 = o_gMD.mul_(do_gMD).sum(-1, keepdim=True)
            dq_gMD, dk_gLD, dv_gLD = torch.empty_like(q_gMD), torch.zeros_like(k_gLD), torch.zeros_like(v_gLD)
            for few, rows, end in _blocks(group.length, share, q_gMD):
                weights = _weights(q_gMD[few, rows], k_gLD[few, :end], share)
                # Formed apart and then added: baddbmm_ into a slice goes matrix by matrix.
                dv_gLD[few, :end] += torch.bmm(weights.mT, do_gMD[few, rows])
                d_scores = torch.bmm(do_gMD[few, rows], v_gLD[few, :end].mT).sub_(row_sums_gM1[few, rows]).mul_(weights)
                torch.bmm(d_scores, k_gLD[few, :end], out=dq_gMD[few, rows])
                dk_gLD[few, :end] += torch.bmm(d_scores.mT, q_gMD[few, rows])
            dq[group.start : group.stop] = _tokens(group, dq_gMD.mul_(ctx.scale), q)
            dk[group.start : group.stop] = _tokens(group, dk_gLD, k)
            dv[group.start : group.stop] = _tokens(group, dv_gLD, v)
        return dq, dk, dv, None, None, None


def _blocks(length: int, share: int, q_gMD: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Yield (which of the matrices, which of their query rows, end of the keys those see); a token has `share` rows.

    As many matrices at once as keep their scores in the cache.
    """
    block = length if length <= 2 * BLOCK else BLOCK
    for start in range(0, length, block):
        end = min(start + block, length)
        rows = slice(start * share, end * share)
        count = max(1, SCORE_BYTES // ((end - start) * share * end * q_gMD.itemsize))
        for first in range(0, len(q_gMD), count):
            yield slice(first, first + count), rows, end


def _weights(q_gmD: Tensor, k_geD: Tensor, share: int) -> Tensor:
    """Return the attention weights of one block, whose tokens are the last of the keys it sees: (g, m, e)."""
    scores_gme = torch.bmm(q_gmD, k_geD.mT)
    num_tokens = q_gmD.shape[1] // share
    # Only the square of the block itself can look ahead; everything before it is past.
    square = scores_gme[:, :, -num_tokens:].unflatten(1, (num_tokens, share))
    square.add_(_future(num_tokens, scores_gme.dtype, scores_gme.device))
    return torch.softmax(scores_gme, dim=-1)


@functools.lru_cache(maxsize=64)
def _future(num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (L, 1, L): minus infinity where the key comes after the query."""
    return torch.full((num_tokens, num_tokens), float("-inf"), dtype=dtype, device=device).triu_(1).unsqueeze(1)


def _queries(group: DocumentGroup, tensor: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return the group's rows of (N, H, D) as (b * K, L * H / K, D), in memory of their own."""
    rows = group.take(tensor.unflatten(1, (heads, -1))).transpose(1, 2)
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format).view(group.rows * heads, -1, tensor.shape[-1])


def _keys(group: DocumentGroup, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the group's rows of (N, K, D) as (b * K, L, D)."""
    return group.take(tensor).transpose(1, 2).to(dtype).reshape(-1, group.length, tensor.shape[-1])


def _tokens(group: DocumentGroup, rows_gMD: Tensor, like: Tensor) -> Tensor:
    """Undo `_queries` or `_keys`: return (stop - start, *like.shape[1:])."""
    heads = len(rows_gMD) // group.rows
    rows = rows_gMD.view(group.rows, heads, group.length, -1, like.shape[-1]).transpose(1, 2)
    return group.put_back(rows.reshape(group.rows, group.length, *like.shape[1:]))
