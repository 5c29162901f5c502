"""The losses of learning from rewards, as functions of tensors: no model, no sampling, no settings.

    pi, pi_old, pi_ref    log-probability of each answer token under the model that learns, under the one that gave the answer,
                          and under the one training began with: `log_probs`, `old`, `reference`
    r_k                   exp(log pi - log pi_old), the importance ratio of a token
    A_k                   its advantage: how much better its answer (or its place in it) did than was to be expected

Answers lie end to end without padding, in their order, so no mask is needed.

Shape letters: S answers, G answers to one prompt, K tokens of all answers.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]
Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo"]

ADVANTAGE_EPSILON = 1e-4
"""Keeps a group of nearly equal rewards from being blown up; the value that TRL has."""


class TokenLosses(NamedTuple):
    """What one token adds to the loss (K,), differentiable; whether its ratio was clipped (K,), and its KL (K,), detached."""

    losses: Tensor
    is_clipped: Tensor
    kl: Tensor | None


def group_advantages(rewards: Tensor, group: int, *, scale: Scale = "group", batch_std: float | None = None) -> Tensor:
    """Return how much better each answer did than the mean of its group: (S,), groups of `group` side by side.

    scale "group": over the group's standard deviation, A = (R - mean) / (std + 1e-4), Shao et al. 2024, section 4.1.2
    (arXiv:2402.03300); "batch": over that of all rewards (`batch_std`, where more than these belong to it); "none": as it is,
    Liu et al. 2025, section 3.2 (arXiv:2503.20783), since dividing favours prompts that are nearly solved or nearly hopeless.
    Standard deviations are of samples (n - 1). In a group without variance all advantages are 0, which a mean that is rounded
    would not give.
    """
    grouped = rewards.view(len(rewards) // group, group)
    advantages = grouped - grouped.mean(dim=1, keepdim=True)
    advantages = advantages.masked_fill(is_without_variance(rewards, group)[:, None], 0.0)
    if scale == "group":
        advantages = advantages / (grouped.std(dim=1, keepdim=True) + ADVANTAGE_EPSILON)
    elif scale == "batch":
        advantages = advantages / ((rewards.std() if batch_std is None else batch_std) + ADVANTAGE_EPSILON)
    return advantages.flatten()


def is_without_variance(rewards: Tensor, group: int) -> Tensor:
    """Return for each group whether all its rewards are equal, so that it teaches nothing: (S / G,) bool."""
    grouped = rewards.view(len(rewards) // group, group)
    return (grouped - grouped[:, :1]).abs().amax(dim=1) <= 1e-8


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Return an estimate of the divergence from the reference at each token: exp(d) - d - 1 with d = log pi_ref - log pi.

    Never negative, and without bias for answers of the model that learns. Source: Schulman 2020, "Approximating KL divergence"
    (his k3); Shao et al. 2024, equation 4 (arXiv:2402.03300).
    """
    d = reference - log_probs
    return torch.exp(d) - d - 1


def clipped(
    log_probs: Tensor, old: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) of each token, and whether the second was less: both (K,).

    Source: Schulman et al. 2017, equation 7 (arXiv:1707.06347); an upper bound of its own: Yu et al. 2025, section 3.1
    (arXiv:2503.14476). Without `epsilon_high` both bounds are `epsilon` away from 1.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratios = torch.exp(log_probs - old)
    gains, bounded = ratios * advantages, ratios.clamp(1 - epsilon, 1 + high) * advantages
    return -torch.min(gains, bounded), (bounded < gains).detach()


def grpo(
    log_probs: Tensor,
    old: Tensor,
    advantages: Tensor,
    reference: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    unbiased_kl: bool = True,
) -> TokenLosses:
    """Return each token's loss, `clipped` + beta `kl_k3`; `advantages` (K,) are those of the tokens' answers.

    With `unbiased_kl` the divergence is multiplied by the ratio r, through which it is learned from too: its gradient then is
    that of the divergence itself, which the gradient of k3 alone is not. Source: Shao et al. 2024, equation 3 (arXiv:2402.03300);
    DeepSeek-AI 2025, section 3.1 (arXiv:2512.02556).
    """
    losses, is_clipped = clipped(log_probs, old, advantages, epsilon=epsilon, epsilon_high=epsilon_high)
    if reference is None:
        return TokenLosses(losses, is_clipped, None)
    kl = kl_k3(log_probs, reference)
    if unbiased_kl:
        kl = kl * torch.exp(log_probs - old)
    return TokenLosses(losses + beta * kl, is_clipped, kl.detach())


def summed(losses: Tensor, lengths: Sequence[int], loss: Loss) -> Tensor:
    """Return the tokens' losses (K,) as one sum, which over the sum of `weights` is the loss of a step. `lengths`: S of them.

    "grpo": each answer counts the same, as the mean over its tokens (Shao et al. 2024, equation 3); "dapo": each token counts
    the same (Yu et al. 2025, section 3.3); "bnpo": the same here, where a step is weighed as a whole however it is cut into
    micro-batches; "dr_grpo": each token counts the same, over a length that is the same for all (Liu et al. 2025, section 3.2).
    """
    if loss != "grpo":
        return losses.sum()
    per_token = torch.tensor([1 / length for length in lengths], dtype=losses.dtype, device=losses.device)
    return (losses * per_token.repeat_interleave(torch.tensor(lengths, device=losses.device))).sum()


def weights(lengths: Sequence[int], loss: Loss, max_new_tokens: int) -> float:
    """Return what `summed` is a sum over: answers, tokens, or tokens that the answers might have had."""
    return {"grpo": len(lengths), "dr_grpo": len(lengths) * max_new_tokens}.get(loss, sum(lengths))


def rewards_of_tokens(
    scores: Tensor, log_probs: Tensor, reference: Tensor | None, lengths: Sequence[int], kl_coef: float
) -> Tensor:
    """Return PPO's reward at each token (K,): -kl_coef (log pi - log pi_ref), and at an answer's last token its score too.

    `scores`: (S,). Source: Ziegler et al. 2019, equation 2 (arXiv:1909.08593).
    """
    rewards = torch.zeros_like(log_probs) if reference is None else -kl_coef * (log_probs - reference)
    last = torch.tensor(lengths, device=rewards.device).cumsum(0) - 1
    return rewards.index_add(0, last, scores.to(rewards))


def gae(rewards: Tensor, values: Tensor, lengths: Sequence[int], *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Return the advantage and the return of each token, both (K,).

    A_t = sum over l of (gamma lam)^l d_{t+l},  d_t = rewards_t + gamma values_{t+1} - values_t,  with a value of 0 past the end;
    the return is A_t + values_t. Source: Schulman et al. 2015, equation 16 (arXiv:1506.02438).
    """
    advantages = torch.zeros_like(rewards)
    end = 0
    for length in lengths:
        begin, end = end, end + length
        ahead = next_value = rewards.new_zeros(())
        for place in range(end - 1, begin - 1, -1):
            ahead = rewards[place] + gamma * next_value - values[place] + gamma * lam * ahead
            next_value = values[place]
            advantages[place] = ahead
    return advantages, advantages + values


def whitened(values: Tensor, mean: float, variance: float) -> Tensor:
    """Return values of mean 0 and variance 1, given what they have (over all processes): (x - mean) / sqrt(variance + 1e-8)."""
    return (values - mean) / (variance + 1e-8) ** 0.5


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Return 1/2 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) of each token (K,).

    The value is held near what it was when the answer was given, as the ratio is. Source: Schulman et al. 2017, equation 9
    (arXiv:1707.06347), with the clipping of its authors' implementation.
    """
    near = torch.max(torch.min(values, old_values + clip), old_values - clip)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)
