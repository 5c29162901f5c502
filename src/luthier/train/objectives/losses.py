"""The losses of preferences, as functions of tensors: no model, no data, no settings. Each is one value a pair (or a row).

    log pi(y|x)     sum of the log-probabilities of an answer's tokens under the model that learns: `chosen`, `rejected`
    log pi_ref      the same under the model it began as: `ref_chosen`, `ref_rejected`
    |y|             tokens of an answer: `chosen_tokens`, `rejected_tokens`

A reward is what a loss compares: beta (log pi - log pi_ref) where there is a reference (Rafailov et al. 2023, section 4), else
beta times the mean log-probability of a token. Rewards come detached, for the log.

Shape letters: P pairs, B rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PairLosses(NamedTuple):
    """The loss of each pair (P,), differentiable, and the rewards of its two answers (P,), detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    robust: bool = False,
) -> PairLosses:
    """Return -(1 - eps) log sigmoid(h) - eps log sigmoid(-h), with h the reward of the chosen answer less that of the rejected.

    `label_smoothing` eps is the share of pairs believed to be the wrong way round. With `robust` the loss is
    (-(1 - eps) log sigmoid(h) + eps log sigmoid(-h)) / (1 - 2 eps), which has the expectation of the loss without such pairs.
    Source: Rafailov et al. 2023, equation 7 (arXiv:2305.18290); eps: its authors' note "cDPO"; robust: Chowdhury et al. 2024,
    section 3 (arXiv:2403.00409).
    """
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    h = chosen_rewards - rejected_rewards
    right, flipped = -(1 - label_smoothing) * F.logsigmoid(h), -label_smoothing * F.logsigmoid(-h)
    losses = (right - flipped) / (1 - 2 * label_smoothing) if robust else right + flipped
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())


def ipo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
) -> PairLosses:
    """Return (h - 1 / (2 beta))^2, with h the difference of the two answers' log-ratios, each as a mean over its tokens.

    The paper writes h with sums; the means are what its authors used, and what keeps long answers from having larger losses.
    Source: Azar et al. 2023, equation 17 (arXiv:2310.12036), where beta is called tau.
    """
    chosen_ratios, rejected_ratios = chosen - ref_chosen, rejected - ref_rejected
    h = chosen_ratios / chosen_tokens - rejected_ratios / rejected_tokens
    losses = (h - 1 / (2 * beta)) ** 2
    return PairLosses(losses, beta * chosen_ratios.detach(), beta * rejected_ratios.detach())


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    rejected_tokens: Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> PairLosses:
    """Return -log sigmoid(beta chosen/|y_chosen| - beta rejected/|y_rejected| - gamma), smoothed as in `dpo`; no reference.

    Source: Meng et al. 2024, equation 6 (arXiv:2405.14734).
    """
    chosen_rewards, rejected_rewards = beta * chosen / chosen_tokens, beta * rejected / rejected_tokens
    h = chosen_rewards - rejected_rewards - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return PairLosses(losses, chosen_rewards.detach(), rejected_rewards.detach())


def orpo(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, *, beta: float) -> PairLosses:
    """Return -p_chosen - beta log sigmoid(log odds(p_chosen) - log odds(p_rejected)); no reference.

    p is an answer's mean log-probability of a token, so the first term is supervised fine-tuning on the chosen answer;
    odds = exp(p) / (1 - exp(p)). Source: Hong et al. 2024, equations 4 to 7 (arXiv:2403.07691), where beta is called lambda.
    """
    chosen_mean, rejected_mean = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = (chosen_mean - _log_of_rest(chosen_mean)) - (rejected_mean - _log_of_rest(rejected_mean))
    losses = -chosen_mean - beta * F.logsigmoid(log_odds)
    return PairLosses(losses, beta * chosen_mean.detach(), beta * rejected_mean.detach())


def kto_kl(mismatched: Tensor, ref_mismatched: Tensor) -> Tensor:
    """Return KTO's estimate of the divergence from the reference: max(0, mean(log pi - log pi_ref)) over questions, each with
    another question's answer; detached. Source: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
    """
    return (mismatched - ref_mismatched).detach().mean().clamp(min=0)


def kto(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    is_desirable: Tensor,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return the loss (B,) and the reward (B,) of each answer; `is_desirable` (B,) bool, `kl` as `kto_kl` gives it.

    The loss is w (1 - sigmoid(beta (r - kl))) for a desirable answer with the log-ratio r = log pi - log pi_ref, and
    w (1 - sigmoid(beta (kl - r))) for an undesirable one.
    Source: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306); w is lambda_D or lambda_U there.
    """
    ratios = log_probs - ref_log_probs
    signs = torch.where(is_desirable, 1.0, -1.0).to(ratios.dtype)
    weights = torch.where(is_desirable, desirable_weight, undesirable_weight).to(ratios.dtype)
    return weights * torch.sigmoid(-beta * signs * (ratios - kl)), beta * ratios.detach()


def bradley_terry(chosen_scores: Tensor, rejected_scores: Tensor, margins: Tensor | None = None) -> Tensor:
    """Return -log sigmoid(chosen - rejected - margin) of each pair (P,): how surely the scores prefer the chosen answer.

    Source: Ouyang et al. 2022, equation 1 (arXiv:2203.02155); the margin: Touvron et al. 2023, equation 2 (arXiv:2307.09288).
    """
    h = chosen_scores - rejected_scores
    return -F.logsigmoid(h if margins is None else h - margins)


def _log_of_rest(log_p: Tensor) -> Tensor:
    """Return log(1 - exp(log_p)) without losing digits at either end; of a certainty, as of the nearest number below it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return torch.where(log_p < -0.7, torch.log1p(-torch.exp(log_p)), torch.log(-torch.expm1(log_p)))
