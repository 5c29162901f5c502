"""LoRA's equations in plain torch, each once. Faster versions elsewhere carry the same names and are tested against these.

Shape letters: R rank, I in_features, O out_features, V rows of an embedding table; `...` any leading axes. For convolutions
I and O are channels, G groups, K the axes of the kernel and L those of the image; a batch axis in front is optional.
For stacked weights E experts, of which each is a matrix of M rows and N columns as it is stored.
Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685, section 4.1:

    h = W x + scaling * B A x        A: (R, I), B: (O, R), B = 0 at the start, so the first forward is the base's
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.errors import ShapeError


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_linear(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return scaling * x A^T B^T, the low-rank part of an adapted linear layer.

    Shapes: x (..., I), lora_A (R, I), lora_B (O, R) -> (..., O). The small factors are cast to x's dtype, never x to theirs:
    float32 copies of x would cost several times the input in saved activations.
    """
    return F.linear(F.linear(x, lora_A.to(x.dtype)) * scaling, lora_B.to(x.dtype))


def lora_embedding(
    ids: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dtype: torch.dtype, padding_idx: int | None = None
) -> Tensor:
    """Return scaling * A^T[ids] B^T, the low-rank part of an adapted embedding, in `dtype`.

    Shapes: ids (...) integers, lora_A (R, V), lora_B (O, R) -> (..., O). The row at `padding_idx` gets no gradient.
    """
    return F.linear(F.embedding(ids, lora_A.T, padding_idx).to(dtype) * scaling, lora_B.to(dtype))


def lora_convolution(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Return the low-rank part of an adapted convolution: the layer's own window with R output channels, then one of size 1.

    Shapes: x (I, L...), lora_A (R, I, K...), lora_B (O, R / G, 1...) -> (O, L'...). lora_A sees every input channel whatever the
    groups, as PEFT has it; the ranks of a group reach the output channels of that group only.
    """
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[lora_A.ndim - 3]
    inner = convolve(x, lora_A.to(x.dtype), None, stride, padding, dilation) * scaling
    return cast(Tensor, convolve(inner, lora_B.to(x.dtype), groups=groups))


def lora_delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return the dense update of one layer, (B A) * scaling, in float32 (float64 for float64 factors).

    Shapes: lora_A (R, I), lora_B (O, R) -> (O, I); of a convolution (R, I, K...), (O, R, 1...) -> (O, I, K...).
    Raises: ShapeError if the two ranks differ.
    """
    if lora_A.shape[0] != lora_B.shape[1]:
        raise ShapeError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} do not share a rank")
    dtype = torch.promote_types(torch.promote_types(lora_A.dtype, lora_B.dtype), torch.float32)
    delta = lora_B.to(dtype).flatten(1) @ lora_A.to(dtype).flatten(1)
    return delta.unflatten(1, lora_A.shape[1:]) * scaling


def expert_factors(lora_A: Tensor, lora_B: Tensor, num_experts: int, is_transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Return views (left (E, M, R), right (E, R, N)) with left[e] @ right[e] the product of expert e as its weight is stored.

    Shapes: lora_A (E R, I), expert by expert; lora_B (O, R E), whose columns run over the experts fastest. That is B_e A_e for
    weights (E, O, I), and A_e^T B_e^T for weights (E, I, O), `is_transposed`. The layout is PEFT's.
    """
    A_ERI = lora_A.unflatten(0, (num_experts, -1))
    B_EOR = lora_B.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
    return (A_ERI.mT, B_EOR.mT) if is_transposed else (B_EOR, A_ERI)


def lora_experts(weight: Tensor, updates: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return weight + the sum of scaling * left @ right over `updates`, each (left, right, scaling) of one adapter.

    Shapes: weight (E, M, N), left (E, M, R), right (E, R, N) -> (E, M, N) in weight's dtype. One product for all adapters, with
    the small factors cast to weight's dtype: nothing but the result is as large as the stack.
    """
    left = torch.cat([scaling * left for left, _, scaling in updates], dim=-1)
    right = torch.cat([right for _, right, _ in updates], dim=-2)
    return torch.baddbmm(weight, left.to(weight.dtype), right.to(weight.dtype))


def fold(weight: Tensor, deltas: list[Tensor]) -> Tensor:
    """Return weight + sum(deltas), summed in float32 (or wider, if the weight is) and rounded once to the weight's dtype."""
    total = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    for delta in deltas:
        total += delta
    return total.to(weight.dtype)


def init_linear_pair(
    r: int,
    in_features: int,
    out_features: int,
    init: bool | str,
    device: torch.device,
    kernel: tuple[int, ...] = (),
    groups: int = 1,
    lora_bias: bool = False,
    num_experts: int = 1,
) -> tuple[Tensor, ...]:
    """Return a fresh (lora_A (R, I), lora_B (O, R)) in float32 for a linear layer; (R, I, K...), (O, R / G, 1...) with a kernel;
    (E R, I), (O, R E) for the stacked weights of E experts.

    `init`: True is kaiming-uniform A and zero B; "gaussian" is A ~ N(0, 1/r^2) and zero B; False leaves both random. With
    `lora_bias` there is a third tensor, the bias (O,) of lora_B, which starts as lora_B does.
    torch's generator is drawn from in the order PEFT does it, so one seed gives the same adapter in both.
    """
    lora_A = torch.empty(r * num_experts, in_features, *kernel, device=device)
    lora_B = torch.empty(out_features, r * num_experts // groups, *(1 for _ in kernel), device=device)
    torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    torch.nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    bound = 1 / math.sqrt(lora_B.shape[1])
    bias = [torch.empty(out_features, device=device).uniform_(-bound, bound)] if lora_bias else []
    if init == "gaussian":
        torch.nn.init.normal_(lora_A, std=1 / r)
    elif init:
        torch.nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    return lora_A, *(torch.zeros_like(tensor) if init else tensor for tensor in (lora_B, *bias))


def init_embedding_pair(
    r: int, num_embeddings: int, embedding_dim: int, init: bool | str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return a fresh (lora_A (R, V), lora_B (O, R)) in float32 for an embedding: A zero and B normal, or both random.

    The zero is on the other side than in a linear layer, as in loralib and PEFT, and so is the order of the draws.
    """
    lora_A = torch.randn(r, num_embeddings, device=device)
    lora_B = torch.randn(embedding_dim, r, device=device)
    if init:
        torch.nn.init.zeros_(lora_A)
        torch.nn.init.normal_(lora_B)
    return lora_A, lora_B
