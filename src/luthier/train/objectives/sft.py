"""Supervised fine-tuning: the likelihood of the answers, summed over their tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import UNLABELLED
from luthier.engine.score import answer_loss, held_out_loss
from luthier.train.objectives.base import MicroBatch, Objective
from luthier.train.rows import Rows, read_and_encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.settings import RunSettings


class Sft(Objective):
    """The negative log likelihood of answer tokens."""

    @classmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> Rows:
        return read_and_encode(settings.data, tokenizer, settings.train.seed)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return the rows with these indices as one batch, packed or padded as the run has it."""
        rows = [row for index in indices for row in self.prepared.rows.item(index)]
        batch = pack(rows) if self.prepared.packed else collate(rows, self.prepared.pad_id)
        labelled = count_labelled(batch)
        return MicroBatch(batch, batch.num_tokens, labelled, labelled)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        return answer_loss(self.model, batch.data)[0], {}

    def evaluate(self) -> dict[str, float]:
        assert self.prepared.rows.held_out is not None
        return {"eval_loss": held_out_loss(self.model, self.prepared.rows.held_out.rows, self.prepared.pad_id).loss}


def count_labelled(batch: Batch | PackedBatch) -> int:
    """Return how many tokens of a batch are predicted; a row's first never is."""
    targets = batch.targets if isinstance(batch, PackedBatch) else batch.labels[:, 1:]
    return int((targets != UNLABELLED).sum())
