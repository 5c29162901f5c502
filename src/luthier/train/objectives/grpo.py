"""Group relative policy optimisation: what an answer is worth is how it did against others to the same prompt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from luthier.train.objectives import policy_losses
from luthier.train.objectives.rollouts import Rollout, RolloutObjective
from luthier.train.objectives.settings import GrpoSettings

if TYPE_CHECKING:
    from luthier.train.prepare import Prepared


class Grpo(RolloutObjective):
    """The loss that `settings.objective.loss` names, of answers in groups."""

    needs_reference = True

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        self.options = cast(GrpoSettings, prepared.settings.objective)

    def asked(self, rollout: Rollout) -> Rollout:
        options = self.options
        per_answer = policy_losses.group_advantages(
            rollout.rewards, options.num_generations, scale=options.scale_rewards, batch_std=self._std(rollout.rewards)
        )
        return replace(
            rollout,
            advantages=per_answer.repeat_interleave(torch.tensor(rollout.lengths, dtype=torch.int64)),
            old=self.asked_of_policy(rollout) if options.iterations > 1 else None,
            reference=self.asked_of_reference(rollout) if options.beta else None,
        )

    def token_loss(self, part: Rollout) -> Tensor:
        options = self.options
        log_probs = self.log_probs(part.rows)
        tokens = policy_losses.grpo(
            log_probs,
            log_probs.detach() if part.old is None else part.old.to(log_probs),
            part.advantages.to(log_probs),
            None if part.reference is None else part.reference.to(log_probs),
            epsilon=options.epsilon,
            epsilon_high=options.epsilon_high,
            beta=options.beta,
            unbiased_kl=options.unbiased_kl,
        )
        self.count(kl=tokens.kl, clipped=tokens.is_clipped)
        return policy_losses.summed(tokens.losses, part.lengths, options.loss)

    def tally_names(self) -> Sequence[str]:
        return [*(["kl"] if self.options.beta else []), *(["clipped"] if self.options.iterations > 1 else [])]

    def weight_of(self, lengths: Sequence[int]) -> float:
        return policy_losses.weights(lengths, self.options.loss, self.options.max_new_tokens)

    def idle(self, rollout: Rollout) -> list[bool]:
        """An answer whose advantage is 0 adds nothing but its divergence."""
        if self.options.beta:
            return super().idle(rollout)
        return [not bool(each.any()) for each in rollout.advantages.split(rollout.lengths)]

    def _std(self, rewards: Tensor) -> float | None:
        """Return the standard deviation of all rewards of the step, over all processes."""
        if self.options.scale_rewards != "batch":
            return None
        (count, total) = self.world.sum([len(rewards), float(rewards.double().sum())])
        (squares,) = self.world.sum([float(((rewards.double() - total / count) ** 2).sum())])
        return float((squares / (count - 1)) ** 0.5)
