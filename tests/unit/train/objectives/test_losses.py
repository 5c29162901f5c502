"""The losses of preferences against numbers worked out with `math` alone, and what must hold whatever the numbers."""

import math

import pytest
import torch
from torch import Tensor

from luthier.train.objectives import losses

CHOSEN, REJECTED = [-4.0, -7.5, -0.3], [-5.0, -6.0, -9.0]
REF_CHOSEN, REF_REJECTED = [-4.5, -7.0, -2.0], [-4.0, -6.5, -8.0]
CHOSEN_TOKENS, REJECTED_TOKENS = [2.0, 3.0, 1.0], [4.0, 2.0, 3.0]


def tensors(*lists: list[float]) -> list[Tensor]:
    return [torch.tensor(each, dtype=torch.float64) for each in lists]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


SUMS = tensors(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
TOKENS = tensors(CHOSEN_TOKENS, REJECTED_TOKENS)
ROWS = list(zip(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("robust", [False, True])
def test_dpo(smoothing: float, robust: bool) -> None:
    found = losses.dpo(*SUMS, beta=0.3, label_smoothing=smoothing, robust=robust)
    for loss, chosen_reward, rejected_reward, (c, r, rc, rr, *_) in zip(*found, ROWS, strict=True):
        h = 0.3 * ((c - rc) - (r - rr))
        right, flipped = -(1 - smoothing) * log_sigmoid(h), -smoothing * log_sigmoid(-h)
        assert float(loss) == pytest.approx((right - flipped) / (1 - 2 * smoothing) if robust else right + flipped, rel=1e-12)
        assert (float(chosen_reward), float(rejected_reward)) == pytest.approx((0.3 * (c - rc), 0.3 * (r - rr)))


def test_robust_dpo_is_unbiased() -> None:
    """If a share of the pairs is the wrong way round, the expected loss is that of right labels: what the correction is for."""
    chosen, rejected, ref_chosen, ref_rejected = SUMS
    right = losses.dpo(*SUMS, beta=0.3, label_smoothing=0.2, robust=True).losses
    wrong = losses.dpo(rejected, chosen, ref_rejected, ref_chosen, beta=0.3, label_smoothing=0.2, robust=True).losses
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, losses.dpo(*SUMS, beta=0.3).losses)


def test_ipo_simpo_orpo() -> None:
    ipo = losses.ipo(*SUMS, *TOKENS, beta=0.3).losses
    simpo = losses.simpo(*SUMS[:2], *TOKENS, beta=2.0, gamma=0.7).losses
    orpo = losses.orpo(*SUMS[:2], *TOKENS, beta=0.4).losses
    for index, (c, r, rc, rr, nc, nr) in enumerate(ROWS):
        assert float(ipo[index]) == pytest.approx(((c - rc) / nc - (r - rr) / nr - 1 / 0.6) ** 2, rel=1e-12)
        assert float(simpo[index]) == pytest.approx(-log_sigmoid(2 * c / nc - 2 * r / nr - 0.7), rel=1e-12)
        odds = [math.exp(p) / (1 - math.exp(p)) for p in (c / nc, r / nr)]
        assert float(orpo[index]) == pytest.approx(-c / nc - 0.4 * log_sigmoid(math.log(odds[0] / odds[1])), rel=1e-12)


def test_orpo_of_a_certain_answer_is_finite() -> None:
    chosen = torch.zeros(2, requires_grad=True)
    loss = losses.orpo(chosen, torch.tensor([-3.0, -200.0]), torch.ones(2), torch.ones(2), beta=0.1).losses
    loss.sum().backward()
    assert bool(loss.isfinite().all()) and bool(chosen.grad.isfinite().all())  # type: ignore[union-attr]


def test_kto() -> None:
    log_probs, ref = tensors([-3.0, -5.0, -1.0], [-4.0, -4.5, -1.5])
    good = torch.tensor([True, False, False])
    kl = losses.kto_kl(*tensors([-2.0, -6.0], [-3.0, -6.5]))
    assert float(kl) == 0.75
    found, rewards = losses.kto(log_probs, ref, good, kl, beta=0.5, desirable_weight=1.5, undesirable_weight=0.7)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (0.5 * (1.0 - 0.75), 0.5 * (0.75 + 0.5), 0.5 * (0.75 - 0.5))]
    assert found.tolist() == pytest.approx([1.5 * (1 - sigmoid[0]), 0.7 * (1 - sigmoid[1]), 0.7 * (1 - sigmoid[2])])
    assert rewards.tolist() == pytest.approx([0.5, -0.25, 0.25])
    assert float(losses.kto_kl(*tensors([-3.0], [-2.0]))) == 0.0, "a divergence is never negative"


def test_bradley_terry() -> None:
    chosen, rejected, margins = tensors([1.0, -2.0], [0.5, 3.0], [0.0, 1.0])
    plain, wide = losses.bradley_terry(chosen, rejected), losses.bradley_terry(chosen, rejected, margins)
    assert plain.tolist() == pytest.approx([-log_sigmoid(0.5), -log_sigmoid(-5.0)])
    assert wide.tolist() == pytest.approx([-log_sigmoid(0.5), -log_sigmoid(-6.0)])


def test_rewards_carry_no_gradient() -> None:
    chosen = SUMS[0].clone().requires_grad_()
    for found in (
        losses.dpo(chosen, *SUMS[1:], beta=0.1),
        losses.ipo(chosen, *SUMS[1:], *TOKENS, beta=0.1),
        losses.simpo(chosen, SUMS[1], *TOKENS, beta=2.0, gamma=0.5),
        losses.orpo(chosen, SUMS[1], *TOKENS, beta=0.1),
    ):
        assert found.losses.requires_grad and not found.chosen_rewards.requires_grad and not found.rejected_rewards.requires_grad
