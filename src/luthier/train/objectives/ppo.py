"""Proximal policy optimisation: what a token is worth is how much better it went on than a learnt value had expected.

The value is a product of the last hidden state with a head that is trained beside the adapter. It is no part of the adapter: its
numbers and its optimiser's are in checkpoints, and a finished run leaves it behind.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from luthier.adapt.fusing import has_plain_head
from luthier.core.errors import ConfigError
from luthier.data.encode import EncodedRow
from luthier.engine.score import answer_log_probs_and_hidden
from luthier.train.objectives import policy_losses
from luthier.train.objectives.rollouts import Rollout, RolloutObjective
from luthier.train.objectives.settings import PpoSettings

if TYPE_CHECKING:
    from luthier.train.prepare import Prepared


class ValueHead(nn.Module):
    """value = w . h + b of a hidden state h; zero at the start, so that nothing is expected of any token."""

    def __init__(self, width: int, device: torch.device | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, device=device))
        self.bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, hidden_KI: Tensor) -> Tensor:
        """Return the value of each position: (K, I) -> (K,), in float32."""
        return hidden_KI.float() @ self.weight + self.bias


class Ppo(RolloutObjective):
    """The clipped losses of policy and values, a mean over tokens."""

    needs_reference = True

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        self.options = cast(PpoSettings, prepared.settings.objective)
        if not has_plain_head(self.model):
            raise ConfigError(
                f"objective 'ppo' reads values off the last hidden states, and the logits of {type(self.model).__name__} are not "
                "just its output layer's product with those; use objective 'grpo', which needs no values"
            )
        self.head = ValueHead(self.model.get_output_embeddings().in_features, self.model.device)

    def extra_parameters(self) -> dict[str, nn.Parameter]:
        return {f"value_head.{name}": parameter for name, parameter in self.head.named_parameters()}

    def asked(self, rollout: Rollout) -> Rollout:
        options, lengths = self.options, rollout.lengths
        if not lengths:  # nothing is left for this process, and the others wait to hear so
            return replace(rollout, advantages=self._whitened(rollout.advantages) if options.whiten else rollout.advantages)
        old, values = self.in_batches(rollout, self._log_probs_and_values)
        known = self.asked_of_reference(rollout) if options.kl_coef else None
        rewards = policy_losses.rewards_of_tokens(rollout.rewards, old, known, lengths, options.kl_coef)
        advantages, returns = policy_losses.gae(rewards, values, lengths, gamma=options.gamma, lam=options.lam)
        rollout = replace(rollout, old=old, reference=known, values=values, returns=returns)
        return replace(rollout, advantages=self._whitened(advantages) if options.whiten else advantages)

    def token_loss(self, part: Rollout) -> Tensor:
        options = self.options
        log_probs, values = self._log_probs_and_values(part.rows)
        old = log_probs.detach() if part.old is None else part.old.to(log_probs)
        policy, is_clipped = policy_losses.clipped(log_probs, old, part.advantages.to(log_probs), epsilon=options.epsilon)
        old_values = values.detach() if part.values is None else part.values.to(values)
        returns = old_values if part.returns is None else part.returns.to(values)
        value = policy_losses.value_losses(values, old_values, returns, options.value_clip)
        kl = None if part.reference is None else log_probs - part.reference.to(log_probs)
        self.count(policy_loss=policy, value_loss=value, clipped=is_clipped, kl=kl)
        return (policy + options.value_coef * value).sum()

    def tally_names(self) -> Sequence[str]:
        return ["policy_loss", "value_loss", "clipped", *(["kl"] if self.options.kl_coef else [])]

    def state(self) -> dict[str, Tensor]:
        return super().state() | {name: parameter.detach().cpu() for name, parameter in self.extra_parameters().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        with torch.no_grad():
            for name, parameter in self.extra_parameters().items():
                parameter.copy_(state[name])

    def _log_probs_and_values(self, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each token of these answers, and the value of where it was chosen: both (K,)."""
        found, rows_K, hidden_KI = answer_log_probs_and_hidden(
            self.model, self.batch_of(rows), temperature=self.settings.temperature
        )
        order = rows_K.argsort(stable=True)
        return found[order], self.head(hidden_KI)[order]

    def _whitened(self, advantages: Tensor) -> Tensor:
        """Whiten over the tokens of the step, in all processes."""
        wide = advantages.double()
        count, total = self.world.sum([len(wide), float(wide.sum())])
        (squares,) = self.world.sum([float(((wide - total / count) ** 2).sum())])
        return policy_losses.whitened(advantages, total / count, squares / max(1.0, count - 1))
