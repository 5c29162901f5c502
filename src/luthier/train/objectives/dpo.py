"""Direct preference optimisation and its kin: from pairs of answers of which one is better."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch import Tensor

from luthier.train.objectives import losses
from luthier.train.objectives.base import MicroBatch
from luthier.train.objectives.losses import PairLosses
from luthier.train.objectives.preferences import Answers, PairRows, PreferenceObjective, read_pairs, tokens_of
from luthier.train.objectives.settings import WITHOUT_REFERENCE, DpoSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.settings import RunSettings


class Dpo(PreferenceObjective):
    """The loss that `settings.objective.loss` names, a mean over pairs."""

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        self.settings = cast(DpoSettings, prepared.settings.objective)
        self.asks_reference = self.settings.loss not in WITHOUT_REFERENCE

    @classmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> PairRows:
        return read_pairs(settings, tokenizer)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        answers: Answers = batch.data
        found = self.reference_log_probs(answers) if self.asks_reference else None
        log_probs = self.log_probs(answers)
        pairs = self.pair_losses(log_probs, found, answers)
        return pairs.losses.sum(), figures_of(pairs, log_probs)

    def held_out_sums(self, places: Sequence[int]) -> dict[str, float]:
        answers = self.answers([self.held_out_items[place] for place in places])
        found = self.held_out_reference(places, answers) if self.asks_reference else None
        log_probs = self.log_probs(answers)
        pairs = self.pair_losses(log_probs, found, answers)
        return {"loss": float(pairs.losses.sum())} | figures_of(pairs, log_probs)

    def pair_losses(self, log_probs: Tensor, reference: Tensor | None, answers: Answers) -> PairLosses:
        """Return the loss and the rewards of each pair. `log_probs` and `reference`: (2 P,), each pair's chosen answer first."""
        settings, beta = self.settings, self.settings.beta
        of_chosen, of_rejected = log_probs[::2], log_probs[1::2]
        counts = log_probs.new_tensor(tokens_of(answers.rows)).clamp(min=1)  # a cut answer may have no token that is predicted
        lengths = counts[::2], counts[1::2]
        if settings.loss == "simpo":
            smoothing = settings.label_smoothing
            return losses.simpo(of_chosen, of_rejected, *lengths, beta=beta, gamma=settings.gamma, label_smoothing=smoothing)
        if settings.loss == "orpo":
            return losses.orpo(of_chosen, of_rejected, *lengths, beta=beta)
        assert reference is not None
        sums = of_chosen, of_rejected, reference[::2], reference[1::2]
        if settings.loss == "ipo":
            return losses.ipo(*sums, *lengths, beta=beta)
        return losses.dpo(*sums, beta=beta, label_smoothing=settings.label_smoothing, robust=settings.loss == "robust")

    def state(self) -> dict[str, Tensor]:
        return super().state() if self.asks_reference else {}


def figures_of(pairs: PairLosses, log_probs: Tensor) -> dict[str, float]:
    """Return what is logged of some pairs, summed: rewards, in how many the better answer has the larger one, and likelihoods."""
    chosen, rejected = pairs.chosen_rewards, pairs.rejected_rewards
    log_probs = log_probs.detach()
    return {
        "rewards/chosen": float(chosen.sum()),
        "rewards/rejected": float(rejected.sum()),
        "rewards/margin": float((chosen - rejected).sum()),
        "rewards/accuracy": float((chosen > rejected).sum()),
        "log_probs/chosen": float(log_probs[::2].sum()),
        "log_probs/rejected": float(log_probs[1::2].sum()),
        "log_probs/accuracy": float((log_probs[::2] > log_probs[1::2]).sum()),
    }
