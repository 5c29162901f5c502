"""How a pair may begin, beyond random A and zero B: orthogonal, olora, pissa. Equations of the starts, in plain torch.

In all three the pair begins at B0 A0 != 0, and what is learnt is the difference from there:

    h = W x + scaling * (B A - B0 A0) x        which is (W - scaling * B0 A0) x + scaling * B A x

Their authors write the residual W - scaling * B0 A0 into the base. Here W stays what it is, and the pair keeps A0 and B0
(docs/decisions/009-starts-are-kept-in-the-pair.md). With A0 and B0 the update is one pair of twice the rank:

    B A - B0 A0 = [B | B - B0] [A - A0 ; A0]   exactly zero at the start, in every dtype

Shape letters: R rank, I in_features, O out_features. A: (R, I), B: (O, R).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from luthier.core.methods import PISSA_NITER
from luthier.core.spectrum import pair_from_svd

ORTHOGONAL_SHRINK = 10.0


def start_of(init: str, weight_OI: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (lora_A, lora_B) of a layer with this weight, in float32. Computed in float32, or in float64 if the weight is.

    The seed's numbers are drawn as PEFT draws them.
    """
    out_features, in_features = weight_OI.shape
    if init == "orthogonal":
        lora_A, lora_B = orthogonal_pair(r, in_features, out_features, weight_OI.device)
    else:
        weight_OI = weight_OI.detach().to(torch.promote_types(weight_OI.dtype, torch.float32))
        niter = PISSA_NITER.fullmatch(init)
        lora_A, lora_B = (
            olora_pair(weight_OI, r) if init == "olora" else pissa_pair(weight_OI, r, scaling, int(niter[1]) if niter else None)
        )
    return lora_A.float().contiguous(), lora_B.float().contiguous()


def orthogonal_pair(r: int, in_features: int, out_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a pair whose product is zero although neither factor is: A in one half of an orthogonal basis, B in the other.

    Q of a random r x r matrix gives the basis, its even rows Q_e and odd rows Q_o: A = (G_A Q_e)^T / 10, B = G_B^T Q_o / 10
    with normal G, so B A = G_B^T (Q_o Q_e^T) G_A^T / 100 = 0. Source: datta0.github.io/posts/rethink-lora-init.
    """
    Q_RR = torch.linalg.qr(torch.randn(r, r, device=device)).Q
    lora_A = (torch.randn(in_features, r // 2, device=device) @ Q_RR[0::2]).T / ORTHOGONAL_SHRINK
    lora_B = torch.randn(r // 2, out_features, device=device).T @ Q_RR[1::2] / ORTHOGONAL_SHRINK
    return lora_A, lora_B


def olora_pair(weight_OI: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return B = the first r columns of Q and A = the first r rows of R, of W = Q R (Büyükakyüz 2024, arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(weight_OI)
    return R[:r], Q[:, :r]


def pissa_pair(weight_OI: Tensor, r: int, scaling: float, niter: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the pair with scaling * B A = U_r S_r V_r^T, W's best approximation of rank r (Meng et al. 2024, arXiv:2404.02948).

    The root of S / scaling goes to each side. `niter` takes a randomised decomposition (Halko et al. 2009) of that many
    subspace iterations instead of the exact one: faster, and another one for each seed.
    """
    if niter is None:
        U, S, Vt = torch.linalg.svd(weight_OI, full_matrices=False)
        U, S, Vt = U[:, :r], S[:r], Vt[:r]
    else:
        U, S, V = torch.svd_lowrank(weight_OI, r, niter=niter)
        Vt = V.T
    return pair_from_svd(U, S, Vt, scaling)


def loftq_pair(
    weight_OI: Tensor, r: int, scaling: float, num_iter: int, rounded: Callable[[Tensor], Tensor]
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor]]:
    """Return what to take off a weight before it is rounded, and the pair (lora_A, lora_B) that is to give back what is lost.

    Li et al. 2023, LoftQ, arXiv:2310.08659, algorithm 1, from B A = 0:

        Q = rounded(W - scaling * B A)        scaling * B A = W - Q's best approximation of rank r        num_iter times

    `rounded` is the weight's way into storage and back. The first result is (scaling * B, A) of the last Q, None where that was
    zero: with it Q can be made of W again. In float32, so that what is kept is what was used.
    """
    weight_OI = weight_OI.detach().float()
    minus: tuple[Tensor, Tensor] | None = None
    for index in range(num_iter):
        lost = weight_OI - rounded(without(weight_OI, minus))
        lora_A, lora_B = (factor.contiguous() for factor in pissa_pair(lost, r, scaling))
        if index + 1 < num_iter:
            minus = scaling * lora_B, lora_A
    return minus, (lora_A, lora_B)


def without(weight_OI: Tensor, minus: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return W - B A for `minus` (B, A), in float32, summed in float64: the same numbers wherever it is done."""
    if minus is None:
        return weight_OI.detach().float()
    B, A = minus
    return (weight_OI.detach().double() - B.double() @ A.double()).float()


class RunningPCA:
    """The leading principal directions of rows that come in batches, about their mean, without keeping the rows.

    The rows so far are stood for by `num_kept` rows, the leading S V^T of the centred ones. Those, the new rows about their own
    mean, and one row for the distance of the two means have the same covariance as all rows together; of these the leading part
    is kept again. Exact while nothing is cut off. Ross et al. 2008, Incremental Learning for Robust Visual Tracking, section 3.
    """

    def __init__(self, num_kept: int):
        self.num_kept, self.num_rows = num_kept, 0
        self._squares = 0.0  # of all rows about their mean, also of what was not kept
        self._mean_I = self._kept_KI = torch.empty(0)

    def add(self, rows_NI: Tensor) -> None:
        """Take in a batch of rows (N, I); computed in float32 at least."""
        rows_NI = rows_NI.detach().to(torch.promote_types(rows_NI.dtype, torch.float32))
        if not len(rows_NI):
            return
        count, new_mean_I = len(rows_NI), rows_NI.mean(0)
        stacked = [rows_NI - new_mean_I]
        self._squares += float(stacked[0].double().square().sum())
        if self.num_rows:
            shift = math.sqrt(self.num_rows * count / (self.num_rows + count)) * (new_mean_I - self._mean_I)
            self._squares += float(shift.double().square().sum())
            stacked = [self._kept_KI, *stacked, shift[None]]
            new_mean_I = self._mean_I + (new_mean_I - self._mean_I) * (count / (self.num_rows + count))
        _, S, Vt = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        self._kept_KI = S[: self.num_kept, None] * Vt[: self.num_kept]
        self._mean_I, self.num_rows = new_mean_I, self.num_rows + count

    def directions(self, r: int) -> Tensor:
        """Return the first r directions (R, I), orthonormal, in float32. Rows that vary in fewer directions have no more."""
        return torch.nn.functional.normalize(self._kept_KI[:r].double(), dim=1).float()

    def shares(self, r: int) -> Tensor:
        """Return what each of the first r directions has of the rows' variance (R,), in float64; all add up to 1."""
        return self._kept_KI[:r].double().square().sum(dim=1) / self._squares


def ranks_by_variance(shares: Sequence[Tensor], budget: int) -> list[int]:
    """Return how many directions each layer gets of `budget`: those that are among the largest shares of all layers together.

    `shares` (K,) of a layer are those of its inputs' variance, K the most it may get. Of equal shares, as q, k and v have them,
    the earlier layer's counts first. Paischer et al. 2024, arXiv:2410.07170.
    """
    layers = torch.repeat_interleave(torch.arange(len(shares)), torch.tensor([len(each) for each in shares]))
    chosen = torch.cat(list(shares)).argsort(descending=True, stable=True)[:budget]
    ranks: list[int] = torch.bincount(layers[chosen.cpu()], minlength=len(shares)).tolist()
    return ranks
