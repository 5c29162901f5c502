"""KTO: from answers marked good or bad, each by itself.

The divergence from the reference is estimated over the whole step, on questions that each have their neighbour's answer (of the
same micro-batch), so how a step is cut into micro-batches or shared by processes changes nothing. It costs one more forward pass
of the model and of the reference, both without gradients.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from luthier.data.encode import UNLABELLED, EncodedRow, EncodedSet, encode
from luthier.data.preferences import Marked, to_marked
from luthier.data.read import RowSet
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.train.objectives import losses
from luthier.train.objectives.base import MicroBatch
from luthier.train.objectives.preferences import BATCH_TOKENS, Answers, PreferenceObjective, refuse_templates
from luthier.train.objectives.settings import KtoSettings
from luthier.train.rows import Rows, read_sides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.settings import RunSettings

log = logging.getLogger(__name__)


@dataclass
class MarkedRows(Rows):
    """Answers, and whether each is good."""

    marks: tuple[bool, ...] = ()
    held_out_marks: tuple[bool, ...] = ()


@dataclass(frozen=True)
class MarkedAnswers:
    """One micro-batch: answers, their marks, and the divergence (a scalar) where it is known already.

    `scales` are the answers of the step for each good one and for each bad one: a sum over the good ones, times that and divided
    by all, is their mean.
    """

    answers: Answers
    marks: tuple[bool, ...]
    kl: Tensor | None = None
    scales: tuple[float, float] = (1.0, 1.0)


class Kto(PreferenceObjective):
    """Kahneman-Tversky optimisation, a mean over answers."""

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        self.settings = cast(KtoSettings, prepared.settings.objective)
        self.rows = cast(MarkedRows, prepared.rows)
        self.last_kl = 0.0
        if all(len(planned) < 2 for _, step in prepared.steps for planned in step):
            log.warning(
                "each micro-batch has one row, so no question can be given another's answer and KTO's divergence counts as 0; "
                "raise train.batch_tokens or train.batch_rows"
            )
        self._warn_of_balance()

    @classmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> MarkedRows:
        refuse_templates(settings)
        data = settings.data

        def make(rows: RowSet) -> tuple[list[list[Marked]], str]:
            marked, line = to_marked(rows.rows, system=data.system)
            return [list(group) for _, group in groupby(marked, key=lambda one: one.row)], line  # a pair stays on one side

        sides = read_sides(data, settings.train.seed, make)
        encoded = [_encoded(side, tokenizer, data.max_length) if side else (None, ()) for side in (sides.train, sides.held_out)]
        (train_set, marks), (held_out_set, held_out_marks) = encoded
        assert train_set is not None
        held_out = [group[0].example for group in sides.held_out]
        return MarkedRows(
            train_set, held_out_set, held_out, sides.description, sides.digest, sides.digests, 1, marks, held_out_marks
        )

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        batch = super().micro_batch(indices)
        return replace(batch, data=MarkedAnswers(batch.data, tuple(self.rows.marks[index] for index in indices)))

    def step_batches(self, step: int, planned: Sequence[Sequence[int]]) -> list[MicroBatch]:
        batches = super().step_batches(step, planned)
        total, count = self.world.sum(self._ratios([batch.data.answers.rows for batch in batches]))
        kl = _clamped(total, count)
        self.last_kl = float(kl)
        marks = [mark for batch in batches for mark in batch.data.marks]
        good, all_answers = self.world.sum([sum(marks), len(marks)])
        scales = all_answers / max(1.0, good), all_answers / max(1.0, all_answers - good)
        return [replace(batch, data=replace(batch.data, kl=kl, scales=scales)) for batch in batches]

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        given: MarkedAnswers = batch.data
        kl = _clamped(*self._ratios([given.answers.rows])) if given.kl is None else given.kl
        found = self.reference_log_probs(given.answers)
        each, rewards = self._losses(self.log_probs(given.answers), found, given.marks, kl)
        good = torch.tensor(given.marks, device=rewards.device)
        of_good, of_bad = float(rewards[good].sum()), float(rewards[~good].sum())
        return each.sum(), {"rewards/good": of_good * given.scales[0], "rewards/bad": of_bad * given.scales[1]}

    def figures(self) -> dict[str, float]:
        return {"kl": self.last_kl}

    def evaluate(self) -> dict[str, float]:
        """Return loss, divergence and rewards over the held-out rows.

        The accuracy is how often a good answer has a larger reward than a bad one, over all pairs of the two.
        """
        batches = batches_by_length([len(row) for (row,) in self.held_out_items], max_tokens=BATCH_TOKENS)
        total, rewards, marks = 0.0, [], []
        with evaluating(self.model):
            kl = _clamped(*self._ratios([[self.held_out_items[place][0] for place in places] for places in batches]))
            for places in batches:
                answers = self.answers([self.held_out_items[place] for place in places])
                is_good = [self.rows.held_out_marks[place] for place in places]
                each, of_each = self._losses(self.log_probs(answers), self.held_out_reference(places, answers), is_good, kl)
                total += float(each.sum())
                rewards.append(of_each)
                marks += is_good
        found = {"eval_loss": total / len(marks), "eval_kl": float(kl)}
        good, bad = (torch.cat(rewards)[torch.tensor(marks) == which] for which in (True, False))
        if len(good) and len(bad):
            wins = (good[:, None] > bad).double() + 0.5 * (good[:, None] == bad).double()
            found |= {"eval_rewards/margin": float(good.mean() - bad.mean()), "eval_rewards/accuracy": float(wins.mean())}
        return found

    def _losses(self, log_probs: Tensor, found: Tensor, marks: Sequence[bool], kl: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and the reward of each answer: (rows,) both."""
        return losses.kto(
            log_probs,
            found,
            torch.tensor(marks, device=log_probs.device),
            kl,
            beta=self.settings.beta,
            desirable_weight=self.settings.desirable_weight,
            undesirable_weight=self.settings.undesirable_weight,
        )

    def _ratios(self, groups: Sequence[Sequence[EncodedRow]]) -> tuple[float, float]:
        """Return the sum of the log-ratios of mismatched answers, over micro-batches of rows, and their number."""
        total, count = 0.0, 0
        with torch.no_grad():
            for group in groups:
                rows = mismatched(group, self.prepared.settings.data.max_length)
                if not rows:
                    continue
                answers = self.answers([[row] for row in rows])
                difference = self.log_probs(answers) - self.reference_log_probs(answers)
                total, count = total + float(difference.sum()), count + len(rows)
        return total, count

    def _warn_of_balance(self) -> None:
        """Say so where good and bad answers weigh very differently in all. Source: the paper's section 4.2."""
        good = sum(self.rows.marks) * self.settings.desirable_weight
        bad = (len(self.rows.marks) - sum(self.rows.marks)) * self.settings.undesirable_weight
        if not bad <= 1.5 * good <= 2.25 * bad:
            log.warning(
                f"good answers weigh {good:g} in all and bad ones {bad:g}; KTO wants a ratio of 1 to 1.33: "
                f"set objective.desirable_weight or objective.undesirable_weight"
            )


def _clamped(total: float, count: float) -> Tensor:
    """Return the estimate of the divergence: a scalar, 0 where there is nothing to go by."""
    return losses.kto_kl(torch.tensor([total / max(1.0, count)]), torch.zeros(1))


def mismatched(rows: Sequence[EncodedRow], max_length: int) -> list[EncodedRow]:
    """Return each row's question with the answer of the row before it (the first with the last's), cut to `max_length`.

    None of a single row. Source of the pairing: Ethayarajh et al. 2024, section 4.1 (arXiv:2402.01306).
    """
    if len(rows) < 2:
        return []
    begins = [next(place for place, label in enumerate(row.labels) if label != UNLABELLED) for row in rows]
    found = []
    for index, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        other, start = rows[index - 1], begins[index - 1]
        ids, labels = row.input_ids[:begin] + other.input_ids[start:], [UNLABELLED] * begin + other.labels[start:]
        found.append(EncodedRow(row.row, ids[:max_length], labels[:max_length]))
    return found


def _encoded(
    groups: Sequence[Sequence[Marked]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> tuple[EncodedSet, tuple[bool, ...]]:
    """Return the rows and their marks, without those that were dropped; of a pair's two answers both go, or none."""
    width, examples = len(groups[0]), [one.example for group in groups for one in group]
    found = encode(examples, tokenizer, max_length=max_length, last_answer=True, width=width)
    marks = {group[0].row: [one.is_desirable for one in group] for group in groups}
    return found, tuple(marks[row.row][place % width] for place, row in enumerate(found.rows))
