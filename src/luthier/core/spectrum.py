"""The singular values of a low-rank update and what follows from them, without ever forming the dense matrix.

    B = Q_B R_B,  A^T = Q_A R_A   (QR)      scaling * B A = Q_B (scaling * R_B R_A^T) Q_A^T

The Qs have orthonormal columns, so the small core in the middle has the singular values of the whole update. Time O((O + I) R^2)
instead of O(O I min(O, I)). Everything here is float64: a tail of small values is what is asked about.

Shape letters: R rank, I in_features, O out_features, K = min(R, O, I) singular values.
"""

import torch
from torch import Tensor


def factored_svd(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (U (O, K), S (K,), V^T (K, I)) of scaling * B A, in float64, S falling. Shapes: lora_A (R, I), lora_B (O, R)."""
    Q_B, core = _core(lora_A, lora_B, scaling)
    U, S, Vt = torch.linalg.svd(core, full_matrices=False)
    Q_A = torch.linalg.qr(lora_A.double().T).Q
    return Q_B @ U, S, Vt @ Q_A.T


def factored_norm(lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """Return |scaling * B A| (Frobenius). Unlike tr(A A^T B^T B) it keeps its digits where the factors cancel."""
    return float(torch.linalg.matrix_norm(_core(lora_A, lora_B, scaling)[1]))


def _core(lora_A: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    R_A = torch.linalg.qr(lora_A.double().T).R
    return Q_B, scaling * (R_B @ R_A.T)


def pair_from_svd(U: Tensor, S: Tensor, Vt: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (lora_A (K, I), lora_B (O, K)) with scaling * B A = U S V^T; the root of S / scaling goes to each side."""
    root_K = (S / scaling).sqrt()
    return root_K[:, None] * Vt, U * root_K


def energy(S: Tensor) -> Tensor:
    """Return the share of |dW|^2 that the first 1, 2, ... K singular values hold. Of an update of zero, nothing is missing: 1."""
    squares = S.double().square().cumsum(0)
    return squares / squares[-1] if len(S) and squares[-1] > 0 else torch.ones_like(squares)


def rank_for_energy(S: Tensor, share: float) -> int:
    """Return the smallest rank whose singular values hold `share` of |dW|^2; 0 for an update of zero."""
    if not numerical_rank(S):
        return 0
    # A sum of squares knows its last digits only roughly; a share of 1 must not ask for more than there is.
    return int((energy(S) < share - 1e-12).sum()) + 1


def tail(S: Tensor, r: int) -> float:
    """Return the distance of the update from its best approximation of rank r: the norm of the values after the first r.

    Source: Eckart and Young 1936, in the Frobenius norm.
    """
    return float(torch.linalg.vector_norm(S[r:].double()))


def stable_rank(S: Tensor) -> float:
    """Return |dW|^2 / s_1^2: how many directions as strong as the strongest would give the same norm. 0 for zero."""
    return float(S.double().square().sum() / S[0].double() ** 2) if numerical_rank(S) else 0.0


def effective_rank(S: Tensor) -> float:
    """Return exp(H(p)) with p = s / sum(s), the entropy's count of directions (Roy and Vetterli 2007). 0 for zero."""
    if not numerical_rank(S):
        return 0.0
    p = S.double() / S.double().sum()
    return float(torch.special.entr(p).sum().exp())


def numerical_rank(S: Tensor) -> int:
    """Return how many singular values are not rounding of the float64 arithmetic here (1e-12 of the largest)."""
    return int(S.gt(1e-12 * S[0]).sum()) if len(S) else 0


def subspace_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return phi (M, N): entry (i-1, j-1) is |P_i^T Q_j|^2 / min(i, j), for the first i columns of P and j of Q.

    Shapes: P = `first` (D, M), Q = `second` (D, N), orthonormal columns. It is 1 where one space lies in the other, 0 where
    they are orthogonal. Of two random spaces in D dimensions max(i, j) / D is expected.
    Source: Hu et al. 2021, arXiv:2106.09685, section 7.2 and appendix G.
    """
    squares = (first.double().T @ second.double()).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, count + 1, device=squares.device) for count in squares.shape)
    # Rounding may leave a hair more than 1.
    return (squares / torch.minimum(rows[:, None], columns)).clamp_max(1.0)


def factored_cosine(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return the cosine of the angle between two updates B A, each given as (lora_A, lora_B), as one vector of numbers each.

    <B1 A1, B2 A2> = sum((B1^T B2) * (A1 A2^T)). 0 where one of them is zero.
    """
    (A1, B1), (A2, B2) = ((lora_A.double(), lora_B.double()) for lora_A, lora_B in (first, second))
    norms = factored_norm(A1, B1, 1.0) * factored_norm(A2, B2, 1.0)
    inner = float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    return max(-1.0, min(1.0, inner / norms)) if norms else 0.0


def largest_singular_value(matrix: Tensor, *, width: int = 8, rounds: int = 8) -> float:
    """Return s_1 of a dense matrix (O, I) by subspace iteration, from below; a few percent short on pure noise, exact otherwise.

    The start is the same for every call, and torch's generator is not drawn from.
    """
    if not matrix.numel():
        return 0.0
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], min(width, *matrix.shape), generator=generator)
    basis = start.to(matrix.device, matrix.dtype)
    for _ in range(rounds):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    return float(torch.linalg.matrix_norm(matrix @ basis, 2))
