"""A reward model: the scores that an adapter with a score head gives to answers. Never trains one (`luthier.train` does)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from luthier.adapt.fusing import fuse
from luthier.adapt.score_head import SCORE, TASK, add_score_head
from luthier.core.errors import AdapterMismatchError, ConfigError
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import encode
from luthier.data.messages import Example, Message
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.engine.score import can_take_packed, last_hidden
from luthier.formats.adapters import load_adapter
from luthier.formats.folder import read_adapter
from luthier.models.load import load_model

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def scores_of(model: "nn.Module", batch: "Batch | PackedBatch") -> "Tensor":
    """Return the score of each row, (B,) in float32 at least, differentiable; the model must have a score head.

    It is read where transformers' ...ForSequenceClassification reads it, so that it is the same there: at the last token that is
    not the configuration's padding. Where a model pads with its stop token, that is the token before the stop.
    """
    head, config = model.get_submodule(SCORE), model.config.get_text_config()  # type: ignore[union-attr, operator]
    scores = cast("Tensor", head(last_hidden(model, batch, passing_over=getattr(config, "pad_token_id", None)))).squeeze(-1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


@dataclass(frozen=True)
class RewardModel:
    """A base model with an adapter that scores. `load` makes one; it is called as a reward function is."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    max_length: int = 1024

    @classmethod
    def load(cls, adapter: str | Path, *, model: str | None = None, dtype: str = "auto", max_length: int = 1024) -> "RewardModel":
        """Load the adapter folder of a run with objective "reward", on `model` or else the base that it names.

        Raises: AdapterMismatchError if it has no score head; ModelError, BaseMismatchError and others of `load_adapter`.
        """
        folder = read_adapter(adapter)
        if folder.config.task_type != TASK:
            raise AdapterMismatchError(
                f"{adapter} has the task type {folder.config.task_type}, a reward model's is {TASK}: it gives no scores. "
                "Train one with: luthier train --objective reward"
            )
        name = model or folder.config.base_model_name_or_path
        if name is None:
            raise ConfigError(f"{adapter} does not name its base; say which it is with model=")
        base = load_model(name, dtype=dtype)
        add_score_head(base.model)
        load_adapter(base.model, folder)
        fuse(base.model)
        return cls(base.model, base.tokenizer, max_length)

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], *, batch_tokens: int = 4096) -> list[float]:
        """Return the score of each answer to its prompt; higher is better. Only differences between scores mean anything."""
        pairs = zip(prompts, answers, strict=True)
        conversations = [(Message("user", prompt), Message("assistant", answer)) for prompt, answer in pairs]
        return self.scores([Example(row, turns) for row, turns in enumerate(conversations)], batch_tokens=batch_tokens)

    def scores(self, examples: Sequence[Example], *, batch_tokens: int = 4096) -> list[float]:
        """Return the score of each conversation's last answer. Raises: DataError, also where one is longer than max_length."""
        rows = encode(examples, self.tokenizer, max_length=self.max_length, last_answer=True)
        if rows.report.truncated:
            raise ConfigError(f"{rows.report.truncated} conversations have more than {self.max_length} tokens; raise max_length")
        packs = can_take_packed(self.model, rows.rows)
        found = [0.0] * len(rows.rows)
        with evaluating(self.model), torch.no_grad():
            for indices in batches_by_length(rows.lengths, max_tokens=batch_tokens):
                together = [rows.rows[index] for index in indices]
                pad_id = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
                batch = pack(together) if packs else collate(together, pad_id)
                for index, score in zip(indices, scores_of(self.model, batch).tolist(), strict=True):
                    found[index] = score
        return found
