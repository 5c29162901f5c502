"""What the objectives over preferences share: reading pairs and marks, log-probabilities of answers, and the reference's, once.

The reference is the same model with its adapter silent (or the frozen copy of the adapter that a run continues), so its share
of the memory is one forward pass without gradients, over before the other begins. It never changes, so what it said of an item
is kept: the second epoch does not ask again. Several processes ask each time, since an item comes to another of them in each
epoch, and where they share the base's weights all must make the same passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luthier.adapt.state import adapter_prefixes
from luthier.core.errors import ConfigError
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import EncodedRow, EncodedSet, encode
from luthier.data.preferences import Pair, to_pairs
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.engine.score import answer_log_probs, can_take_packed, row_sums
from luthier.train.objectives.base import MicroBatch, Objective
from luthier.train.reference import reference
from luthier.train.rows import Rows, read_sides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.settings import DataSettings, RunSettings

BATCH_TOKENS = 4096
"""Of one forward pass over held-out rows."""


@dataclass(frozen=True)
class Answers:
    """Rows as a batch; `indices` are the items they are of, in the training rows, or None for others."""

    batch: Batch | PackedBatch
    rows: list[EncodedRow]
    indices: list[int] | None = None


@dataclass
class PairRows(Rows):
    """Pairs: of each item the chosen answer's row, then the rejected one's."""

    margins: list[float] | None = None
    held_out_margins: list[float] | None = None


def read_pairs(settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> PairRows:
    """Read and encode pairs. Raises: DataError, ConfigError."""
    refuse_templates(settings)
    data = settings.data
    sides = read_sides(data, settings.train.seed, lambda rows: to_pairs(rows.rows, system=data.system))
    train_set, margins = _encoded(sides.train, tokenizer, data)
    held_out_set, held_out_margins = _encoded(sides.held_out, tokenizer, data) if sides.held_out else (None, None)
    held_out = [pair.chosen for pair in sides.held_out]
    return PairRows(
        train_set, held_out_set, held_out, sides.description, sides.digest, sides.digests, 2, margins, held_out_margins
    )


def refuse_templates(settings: "RunSettings") -> None:
    """Raise ConfigError where templates are given: the columns of preferences are known by their names."""
    if settings.data.prompt is not None:
        raise ConfigError(
            f"data.prompt and data.completion have no effect with objective {settings.objective.kind!r}: "
            "its columns are prompt, chosen and rejected (or completion and label)"
        )


def _encoded(
    pairs: Sequence[Pair], tokenizer: "PreTrainedTokenizerBase", data: "DataSettings"
) -> tuple[EncodedSet, list[float] | None]:
    examples = [side for pair in pairs for side in (pair.chosen, pair.rejected)]
    found = encode(examples, tokenizer, max_length=data.max_length, last_answer=True, width=2)
    margins = {pair.row: pair.margin or 0.0 for pair in pairs if pair.margin is not None}
    return found, [margins.get(row.row, 0.0) for row in found.rows[::2]] if margins else None


class PreferenceObjective(Objective):
    """An objective over the log-probabilities of whole answers, against the model as it was when the run began."""

    needs_reference = True
    silences_base = True

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        silence_dropout(self.model)
        width = prepared.rows.width
        self.known = torch.full((len(prepared.rows.item_lengths), width), torch.nan)
        """What the reference said of each answer to train on, NaN where it was not asked yet."""
        held_out = prepared.rows.held_out
        self.known_held_out: dict[int, Tensor] = {}
        self.held_out_items = [] if held_out is None else _grouped(held_out.rows, width)

    def answers(self, items: Sequence[Sequence[EncodedRow]], indices: Sequence[int] | None = None) -> Answers:
        """Return the rows of these items as one batch, packed or padded as the run has it."""
        rows = [row for item in items for row in item]
        packs = self.prepared.packed and can_take_packed(self.model, rows)
        batch = pack(rows) if packs else collate(rows, self.prepared.pad_id)
        return Answers(batch, rows, None if indices is None else list(indices))

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return these items as one batch; it weighs as many as there are."""
        answers = self.answers([self.prepared.rows.item(index) for index in indices], indices)
        labelled = sum(tokens_of(answers.rows))
        return MicroBatch(answers, answers.batch.num_tokens, labelled, len(indices))

    def log_probs(self, answers: Answers) -> Tensor:
        """Return the summed log-probability of each row's answer: (rows,)."""
        return row_sums(*answer_log_probs(self.model, answers.batch), len(answers.rows))

    def reference_log_probs(self, answers: Answers) -> Tensor:
        """Return what the reference gives each row's answer: (rows,). It is asked once about an item of the training rows."""
        keeps = answers.indices is not None and self.world.size == 1
        if keeps:
            known = self.known[answers.indices].flatten()
            if not bool(known.isnan().any()):
                return known.to(self.model.device)
        with torch.no_grad(), reference(self.model, self.prepared.frozen):
            found = self.log_probs(answers)
        if keeps:
            self.known[answers.indices] = found.view(len(self.known[answers.indices]), -1).to(self.known)
        return found

    def evaluate(self) -> dict[str, float]:
        """Return the loss and its figures over the held-out rows, the names beginning with "eval_"."""
        totals: dict[str, float] = {}
        count = len(self.held_out_items)
        with evaluating(self.model):
            for places in batches_by_length([sum(map(len, item)) for item in self.held_out_items], max_tokens=BATCH_TOKENS):
                for name, value in self.held_out_sums(places).items():
                    totals[name] = totals.get(name, 0.0) + value
        return {f"eval_{name}": value / count for name, value in totals.items()}

    def held_out_sums(self, places: Sequence[int]) -> dict[str, float]:
        """Return "loss" and other figures, summed over these held-out items."""
        raise NotImplementedError

    def held_out_reference(self, places: Sequence[int], answers: Answers) -> Tensor:
        """Return what the reference gives the answers of these held-out items; it is asked once in a run."""
        if not all(place in self.known_held_out for place in places):
            found = self.reference_log_probs(answers).view(len(places), -1)
            self.known_held_out.update(zip(places, found, strict=True))
        return torch.cat([self.known_held_out[place] for place in places])

    def state(self) -> dict[str, Tensor]:
        return {"reference_log_probs": self.known} if self.needs_reference else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.known = state.get("reference_log_probs", self.known)


def tokens_of(rows: Sequence[EncodedRow]) -> list[int]:
    """Return how many tokens of each row's answer are predicted."""
    return [sum(label != -100 for label in row.labels[1:]) for row in rows]


def silence_dropout(model: nn.Module) -> None:
    """Let no module of the base drop anything: a log-ratio would compare two models with different parts missing.

    An adapter's own dropout is refused by the settings; that of other adapters on the same base is not this run's.
    """
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def drops_parts(model: nn.Module) -> bool:
    """Return whether some module of the base drops anything while it is trained."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(model))


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield (module, attribute) of every rate of the base: nn.Dropout's, and floats that blocks hand to functional dropout."""
    inside = adapter_prefixes(model)
    for path, module in model.named_modules():
        if f"{path}.".startswith(inside):
            continue
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "layerdrop" in name):
                yield module, name


def _grouped(rows: Sequence[EncodedRow], width: int) -> list[list[EncodedRow]]:
    return [list(rows[at : at + width]) for at in range(0, len(rows), width)]
