"""AdaLoRA's equations: ranks that move to where they count. Plain functions; who holds the state is `luthier.adapt.ranks`.

    h = W x + scaling * P diag(E) Q x      P = lora_B (O, R), E = lora_E (R, 1), Q = lora_A (R, I), E = 0 at the start

A triplet is one E_i with its column of P and its row of Q. Every few steps the triplets that count least get E_i = 0, as many
as the budget of that step does not pay for; at the end `target_r` for each layer on average are left.
Zhang et al. 2023, AdaLoRA, arXiv:2303.10512, sections 3.1 to 3.3. The budget is the one of the authors' code: the formula as
printed exceeds the first budget at its beginning and does not reach the last one.

Shape letters: R rank, I in_features, O out_features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INIT_STD = 0.02
RANK_OFFSET = 1e-5
"""Added to the rank in the scaling by the authors' code and by PEFT, and so in every adapter there is."""


def adalora_scaling(init_r: int, lora_alpha: float) -> float:
    """Return alpha / (init_r + 1e-5). The rank of the beginning counts, however many triplets are left."""
    return lora_alpha / (init_r + RANK_OFFSET)


def init_triplets(r: int, in_features: int, out_features: int, init: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a fresh (lora_A (R, I), lora_B (O, R), lora_E (R, 1)) in float32: normal A and B, zero E; without `init` all random.

    torch's generator is drawn from in the order PEFT does it, so one seed gives the same adapter in both.
    """
    lora_A = torch.randn(r, in_features, device=device)
    lora_E = torch.randn(r, 1, device=device)
    lora_B = torch.randn(out_features, r, device=device)
    torch.randn(1)  # PEFT draws the place of its rank counter
    if init:
        torch.nn.init.zeros_(lora_E)
        torch.nn.init.normal_(lora_A, std=INIT_STD)
        torch.nn.init.normal_(lora_B, std=INIT_STD)
    return lora_A, lora_B, lora_E


def budget_at(step: int, first: int, last: int, *, tinit: int, tfinal: int, total_step: int) -> int:
    """Return how many triplets the whole adapter may have after `step` optimiser steps (counted from 1).

    `first` until tinit, `last` from total_step - tfinal on, and a cubic descent between.
    """
    if step <= tinit:
        return first
    if step >= total_step - tfinal:
        return last
    rest = 1 - (step - tinit) / (total_step - tfinal - tinit)
    return int(last + (first - last) * rest**3)


class Importance(NamedTuple):
    """What is remembered of one tensor: its smoothed sensitivity, and how much the sensitivity varies about that."""

    sensitivity: Tensor
    uncertainty: Tensor

    @classmethod
    def none_of(cls, weight: Tensor) -> "Importance":
        """Return the importance of a tensor before the first step: zeros."""
        return cls(torch.zeros_like(weight), torch.zeros_like(weight))

    def after(self, weight: Tensor, gradient: Tensor | None, beta1: float, beta2: float) -> "Importance":
        """Return the importance after one more step: running means of |w * dL/dw| and of its distance from its own mean.

        The weight is the one after the step, its gradient that of before, as in the authors' code. No gradient counts as zero.
        """
        now = torch.zeros_like(weight) if gradient is None else (weight * gradient).abs()
        sensitivity = beta1 * self.sensitivity + (1 - beta1) * now
        uncertainty = beta2 * self.uncertainty + (1 - beta2) * (now - sensitivity).abs()
        return Importance(sensitivity, uncertainty)

    def score(self) -> Tensor:
        """Return the importance of each number of the tensor."""
        return self.sensitivity * self.uncertainty


def triplet_scores(lora_A: Importance, lora_B: Importance, lora_E: Importance) -> Tensor:
    """Return (R,): the score of E_i, plus the mean score of its row of A, plus that of its column of B."""
    return lora_E.score().view(-1) + (lora_A.score().mean(dim=1) + lora_B.score().mean(dim=0))


def allocate(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Return for each layer which of its triplets (R,) stay, so that `budget` of them do, over all layers.

    Those stay whose score is above that of the best one to go; of several with that very score none does, as in the
    authors' code. A budget for all of them (where PEFT fails) keeps all.
    """
    if not scores:
        return []
    everything = torch.cat(list(scores))
    surplus = len(everything) - budget
    if surplus <= 0:
        return [torch.ones_like(each, dtype=torch.bool) for each in scores]
    threshold = everything.kthvalue(surplus).values
    return [each > threshold for each in scores]


def orthogonality_penalty(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the mean over all factors of |A A^T - 1| and |B^T B - 1| (Frobenius, not squared), given (lora_A, lora_B) pairs.

    It keeps a triplet's E_i comparable with others: as in a singular value decomposition, the size of an update is in E alone.
    """
    grams = [gram for lora_A, lora_B in pairs for gram in (lora_A @ lora_A.T, lora_B.T @ lora_B)]
    distances = [torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)) for gram in grams]
    return torch.stack(distances).mean()
