"""The rows of a run: read, split into those to train on and those held out, and encoded."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from luthier.core.errors import ConfigError, ModelError
from luthier.data.batches import split_rows
from luthier.data.encode import EncodedRow, EncodedSet, encode
from luthier.data.formats import sniff_format
from luthier.data.messages import Example, to_examples
from luthier.data.read import RowSet, read_rows
from luthier.train.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass
class Rows:
    """The rows of a run: examples as read, encoded for training, and what they were told apart by."""

    train: EncodedSet
    held_out: EncodedSet | None
    held_out_examples: list[Example]
    description: str
    digest: str
    digests: dict[str, str] = field(default_factory=dict)
    """Role (train, eval) -> digest of the rows that were read for it; `digest` is of all of them."""
    width: int = 1
    """Encoded rows of one item: item i is rows i * width up to (i + 1) * width. A pair to prefer one of is two rows."""

    @property
    def item_lengths(self) -> list[int]:
        """Tokens of each item to train on, as `plan_steps` wants them."""
        lengths = self.train.lengths
        return [sum(lengths[start : start + self.width]) for start in range(0, len(lengths), self.width)]

    @property
    def longest(self) -> int:
        """Tokens of the longest row that the model will be given, held out or not."""
        return max(len(row) for rows in (self.train, self.held_out) if rows for row in rows.rows)

    def item(self, index: int) -> list[EncodedRow]:
        """Return the encoded rows of one item to train on."""
        return self.train.rows[index * self.width : (index + 1) * self.width]


@dataclass(frozen=True)
class Sides(Generic[T]):
    """What was read for a run: examples (or pairs of them) to train on and held out, and the digests of their rows."""

    train: list[T]
    held_out: list[T]
    description: str
    digest: str
    digests: dict[str, str]


def read_sides(data: DataSettings, seed: int, make: Callable[[RowSet], tuple[list[T], str]]) -> Sides[T]:
    """Read the rows, let `make` turn them into examples and a line for people, and hold some out.

    They are told apart before encoding: a conversation stays on one side.
    """
    rows = read_rows(data.path, limit=data.limit)
    train, description = make(rows)
    if data.eval_path is not None:
        held_out_rows = read_rows(data.eval_path)
        held_out, _ = make(held_out_rows)
        digest = hashlib.sha256((rows.digest + held_out_rows.digest).encode()).hexdigest()
        return Sides(train, held_out, description, digest, {"train": rows.digest, "eval": held_out_rows.digest})
    train_index, held_out_index = split_rows(len(train), data.eval_fraction, seed)
    held_out = [train[index] for index in held_out_index]
    return Sides([train[index] for index in train_index], held_out, description, rows.digest, {"train": rows.digest})


def read_and_encode(data: DataSettings, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Rows:
    """Read conversations, hold some out, and encode both."""
    templates: dict[str, Any] = {"prompt_template": data.prompt, "completion_template": data.completion, "system": data.system}

    def make(rows: RowSet) -> tuple[list[Example], str]:
        line = "columns through the templates of [data]" if data.prompt else sniff_format(rows.rows).description
        return to_examples(rows.rows, **templates), line

    sides = read_sides(data, seed, make)
    train_set = encode(sides.train, tokenizer, max_length=data.max_length)
    held_out_set = encode(sides.held_out, tokenizer, max_length=data.max_length) if sides.held_out else None
    return Rows(train_set, held_out_set, sides.held_out, sides.description, sides.digest, sides.digests)


def encode_file(path: Path, data: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> EncodedSet:
    """Read and encode the rows of another file as those of `data` are."""
    templates: dict[str, Any] = {"prompt_template": data.prompt, "completion_template": data.completion, "system": data.system}
    return encode(to_examples(read_rows(path).rows, **templates), tokenizer, max_length=data.max_length)


def check_rows_fit(rows: Rows, model: "PreTrainedModel") -> None:
    """Raise ConfigError if a row is longer than the model can read, or ModelError if it has tokens the model does not have."""
    encoded = [*rows.train.rows, *(rows.held_out.rows if rows.held_out else [])]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room and rows.longest > room:
        raise ConfigError(
            f"the longest row has {rows.longest} tokens, this model reads {room} at most; set data.max_length to {room}"
        )
    highest, known = max(max(row.input_ids) for row in encoded), model.get_input_embeddings().weight.shape[0]
    if highest >= known:
        raise ModelError(
            f"the tokenizer gives token {highest}, but the model knows {known} tokens: they do not belong together. "
            "Use the model's own tokenizer."
        )
