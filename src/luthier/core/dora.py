"""DoRA's equations in plain torch. Shape letters: R rank, I in_features, O out_features; `...` any leading axes.

Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv:2402.09353, sections 4.1 to 4.3:

    W' = (m / n) (W + scaling * B A)        m: (O,), trained; n = ||W + scaling * B A|| of each output's row

m starts as n, so the first forward is the base's. n follows the pair but no gradient flows through it (section 4.3). With
dropout x stays whole in the base's own term only:

    y = W x + b + (m/n - 1) W drop(x) + (m/n) scaling * B A drop(x)

For an embedding table, weight (V, O), the rows meant here are those of its transpose: one norm for each output. For a
convolution, weight (O, I, K...), a row is all that makes one output channel, and W x is the layer's own convolution.
"""

import torch
from torch import Tensor


def dora_norm_plain(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Return n (O,), the plain expression that `dora_norm` equals. Shapes: weight (O, I), lora_A (R, I), lora_B (O, R); of a
    convolution (O, I, K...), (R, I, K...), (O, R, 1...).
    """
    dtype = _wide(weight, lora_A, lora_B)
    delta = lora_B.to(dtype).flatten(1) @ lora_A.to(dtype).flatten(1)
    return torch.linalg.vector_norm(weight.to(dtype).flatten(1) + scaling * delta, dim=1)


def row_squares(weight: Tensor) -> Tensor:
    """Return ||W||^2 of each row of weight (O, I) or (O, I, K...), in float32 or wider: what of n does not change while the base
    is frozen.
    """
    return torch.linalg.vector_norm(weight.flatten(1), dim=1, dtype=_wide(weight)).square()


def dora_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, squares: Tensor | None = None) -> Tensor:
    """Return n (O,) without forming B A, in float32 or wider and without gradients. `squares` are `row_squares(weight)`.

    ||W + s B A||^2 = ||W||^2 + 2 s sum((W A^T) * B) + s^2 sum((B A A^T) * B), each sum over R
    """
    dtype = _wide(weight, lora_A, lora_B)
    weight, lora_A, lora_B = (each.detach().to(dtype).flatten(1) for each in (weight, lora_A, lora_B))
    squares = row_squares(weight) if squares is None else squares
    crossed = (weight @ lora_A.T + (0.5 * scaling) * (lora_B @ (lora_A @ lora_A.T))) * lora_B
    # Rounding could bring a row that the pair cancels below zero.
    return (squares + (2 * scaling) * crossed.sum(dim=1)).clamp_min(0).sqrt()


def dora_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return m / n (O,). Where n is 0, as for a row of zeros, it is m: the row times anything is zero, and never NaN."""
    return magnitude / torch.where(norm > 0, norm, 1)


def dora_update(base: Tensor, low_rank: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return (m/n - 1) base + (m/n) low_rank, what DoRA adds to a layer's output, in float32 or wider.

    Shapes: base (..., O) is W drop(x) without bias, low_rank (..., O) is scaling * B A drop(x); magnitude and norm (O,), or
    (O, 1...) where axes of an image follow the outputs.
    """
    scale = dora_scale(magnitude, norm)
    return (scale - 1) * base + scale * low_rank


def dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return W' - W (O, I) or (O, I, K...), in float64: a merge adds it to W and rounds the sum. `delta` is scaling * B A."""
    weight = weight.double()
    return dora_scale(magnitude, norm).double().view(-1, *(1 for _ in weight.shape[1:])) * (weight + delta) - weight


def dora_change(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor) -> float:
    """Return |W' - W| (Frobenius) without forming B A, in float64: what DoRA changes in all.

    With c = m/n a row of W' - W is (c - 1) w + c d, where d is that row of the low-rank part.
    """
    weight, lora_A, lora_B = weight.double(), lora_A.double(), scaling * lora_B.double()
    scale = dora_scale(magnitude.double(), dora_norm(weight, lora_A, lora_B, 1.0))
    inner = ((weight @ lora_A.T) * lora_B).sum(dim=1)
    low_rank = ((lora_B @ (lora_A @ lora_A.T)) * lora_B).sum(dim=1)
    squares = (scale - 1) ** 2 * row_squares(weight) + 2 * (scale - 1) * scale * inner + scale**2 * low_rank
    return float(squares.clamp_min(0).sum().sqrt())


def _wide(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
