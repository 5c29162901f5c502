"""The losses of learning from rewards, against plain loops in float64 that are written out here."""

import math
import random

import pytest
import torch
from torch import Tensor

from luthier.train.objectives import policy_losses

LENGTHS = [3, 1, 5, 2]
K = sum(LENGTHS)


def numbers(seed: int, count: int = K, scale: float = 1.0) -> list[float]:
    dice = random.Random(seed)
    return [scale * dice.gauss(0, 1) for _ in range(count)]


def tensor(values: list[float], *, learns: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=learns)


def answers(values: list[float]) -> list[list[float]]:
    """Cut the tokens of all answers into those of each."""
    left = list(values)
    return [[left.pop(0) for _ in range(length)] for length in LENGTHS]


def test_advantages_of_groups_with_numbers_worked_out_by_hand() -> None:
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    none = policy_losses.group_advantages(rewards, 4, scale="none")
    assert none.tolist() == [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0]
    std = math.sqrt(4 * 0.25 / 3)  # of a sample
    group = policy_losses.group_advantages(rewards, 4, scale="group")
    assert group.tolist() == pytest.approx([0.5 / (std + 1e-4) * sign for sign in (1, -1, -1, 1)] + [0] * 4)
    mean = 10 / 8
    std = math.sqrt(sum((value - mean) ** 2 for value in rewards.tolist()) / 7)
    batch = policy_losses.group_advantages(rewards, 4, scale="batch")
    assert batch.tolist() == pytest.approx([value / (std + 1e-4) for value in none.tolist()])


def test_groups_whose_rewards_are_all_equal_are_told() -> None:
    rewards = tensor([0.3, 0.3, 0.3, 0.1, 0.3, 0.3])
    assert policy_losses.is_without_variance(rewards, 3).tolist() == [True, False]


@pytest.mark.parametrize(("value", "group"), [(0.9, 8), (100.3, 8), (-1234.567, 10)])
def test_equal_rewards_teach_exactly_nothing(value: float, group: int) -> None:
    """The mean of equal numbers in float32 need not be that number."""
    for scale in ("group", "batch", "none"):
        found = policy_losses.group_advantages(torch.full((group,), value), group, scale=scale)
        assert not bool(found.any())


def test_k3_has_the_mean_of_the_divergence_and_is_never_negative() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    k3 = policy_losses.kl_k3(p.log(), q.log())
    assert bool((k3 >= 0).all())
    assert float((p * k3).sum()) == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True)))


def test_the_gradient_of_the_weighed_divergence_is_that_of_the_divergence() -> None:
    logits = tensor([0.3, -0.2, 0.9], learns=True)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    p = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad((p.exp() * (p - q.log())).sum(), logits)
    zero = torch.zeros(3, dtype=torch.float64)
    found = {}
    for unbiased in (True, False):
        log_p = logits.log_softmax(0)
        tokens = policy_losses.grpo(log_p, log_p.detach(), zero, q.log(), beta=1.0, unbiased_kl=unbiased)
        (found[unbiased],) = torch.autograd.grad((p.detach().exp() * tokens.losses).sum(), logits)
    assert found[True].tolist() == pytest.approx(wanted.tolist())
    assert not torch.allclose(found[False], wanted)


@pytest.mark.parametrize("loss", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_a_loss_is_a_sum_over_its_weights(loss: policy_losses.Loss) -> None:
    values = numbers(1)
    found = float(policy_losses.summed(tensor(values), LENGTHS, loss)) / policy_losses.weights(LENGTHS, loss, 7)
    if loss == "grpo":
        wanted = sum(sum(answer) / len(answer) for answer in answers(values)) / len(LENGTHS)
    else:
        wanted = sum(values) / (7 * len(LENGTHS) if loss == "dr_grpo" else K)
    assert found == pytest.approx(wanted)


class PlainPpo:
    """PPO of four answers, in Python's floats, one token at a time; nothing of ours is called."""

    kl_coef, gamma, lam, epsilon, value_clip, value_coef = 0.1, 0.9, 0.8, 0.2, 0.15, 0.3

    def __init__(self) -> None:
        self.scores = [1.0, -0.5, 0.25, 2.0]
        self.old, self.reference = numbers(2), numbers(3)
        self.old_values = numbers(4, scale=0.3)
        self.log_probs = [a + b for a, b in zip(self.old, numbers(5, scale=0.3), strict=True)]
        self.values = [a + b for a, b in zip(self.old_values, numbers(6, scale=0.2), strict=True)]
        self.rewards: list[float] = []
        self.advantages: list[float] = []
        for score, old, reference, values in zip(
            self.scores, *map(answers, (self.old, self.reference, self.old_values)), strict=True
        ):
            rewards = [-self.kl_coef * (a - b) for a, b in zip(old, reference, strict=True)]
            rewards[-1] += score
            after = [*values[1:], 0.0]
            deltas = [r + self.gamma * b - a for r, a, b in zip(rewards, values, after, strict=True)]
            # Written as the sum that the paper has, not as the recursion.
            self.advantages += [
                sum((self.gamma * self.lam) ** (later - now) * deltas[later] for later in range(now, len(deltas)))
                for now in range(len(deltas))
            ]
            self.rewards += rewards
        self.returns = [a + v for a, v in zip(self.advantages, self.old_values, strict=True)]
        mean = sum(self.advantages) / K
        self.variance = sum((each - mean) ** 2 for each in self.advantages) / (K - 1)
        self.mean = mean
        self.whitened = [(each - mean) / math.sqrt(self.variance + 1e-8) for each in self.advantages]

    def loss(self) -> tuple[float, list[float], list[float]]:
        """Return the mean loss, and its gradients by log-probability and by value."""
        total, by_log_prob, by_value = 0.0, [], []
        for k in range(K):
            ratio, advantage = math.exp(self.log_probs[k] - self.old[k]), self.whitened[k]
            near = min(max(ratio, 1 - self.epsilon), 1 + self.epsilon)
            total -= min(ratio * advantage, near * advantage)
            by_log_prob.append(-ratio * advantage / K if ratio * advantage <= near * advantage else 0.0)
            value, old, target = self.values[k], self.old_values[k], self.returns[k]
            held = min(max(value, old - self.value_clip), old + self.value_clip)
            free_error, held_error = (value - target) ** 2, (held - target) ** 2
            total += self.value_coef * 0.5 * max(free_error, held_error)
            is_free = free_error >= held_error
            slope = (value - target) if is_free else (held - target) * (held == value)
            by_value.append(self.value_coef * slope / K)
        return total / K, by_log_prob, by_value


def test_ppo_is_the_case_written_out_in_plain_loops() -> None:
    plain = PlainPpo()
    rewards = policy_losses.rewards_of_tokens(
        tensor(plain.scores), tensor(plain.old), tensor(plain.reference), LENGTHS, plain.kl_coef
    )
    assert rewards.tolist() == pytest.approx(plain.rewards, rel=1e-12)
    advantages, returns = policy_losses.gae(rewards, tensor(plain.old_values), LENGTHS, gamma=plain.gamma, lam=plain.lam)
    assert advantages.tolist() == pytest.approx(plain.advantages, rel=1e-12)
    assert returns.tolist() == pytest.approx(plain.returns, rel=1e-12)
    whitened = policy_losses.whitened(advantages, plain.mean, plain.variance)
    assert whitened.tolist() == pytest.approx(plain.whitened, rel=1e-12)

    log_probs, values = tensor(plain.log_probs, learns=True), tensor(plain.values, learns=True)
    policy, is_clipped = policy_losses.clipped(log_probs, tensor(plain.old), whitened, epsilon=plain.epsilon)
    value = policy_losses.value_losses(values, tensor(plain.old_values), returns, plain.value_clip)
    loss = (policy + plain.value_coef * value).mean()
    loss.backward()
    wanted, by_log_prob, by_value = plain.loss()
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert log_probs.grad.tolist() == pytest.approx(by_log_prob, rel=1e-12)
    assert values.grad.tolist() == pytest.approx(by_value, rel=1e-12)
    assert is_clipped.tolist() == [slope == 0.0 for slope in by_log_prob]
    assert 0 < int(is_clipped.sum()) < K, "a case without clipping would leave it untested"
    held = [abs(a - b) > plain.value_clip for a, b in zip(plain.values, plain.old_values, strict=True)]
    assert 0 < sum(held) < K


def test_an_upper_bound_of_its_own_lets_ratios_rise_further() -> None:
    log_probs = tensor([math.log(1.25), math.log(0.75)])
    found, is_clipped = policy_losses.clipped(log_probs, tensor([0.0, 0.0]), tensor([1.0, -1.0]), epsilon=0.2, epsilon_high=0.3)
    assert found.tolist() == pytest.approx([-1.25, 0.8])
    assert is_clipped.tolist() == [False, True]
