"""The rows of a run: read, split into those to train on and those held out, and encoded."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, ModelError
from luthier.data.batches import split_rows
from luthier.data.encode import EncodedRow, EncodedSet, encode
from luthier.data.formats import sniff_format
from luthier.data.messages import Example, to_examples
from luthier.data.read import read_rows
from luthier.train.settings import DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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

    def item(self, index: int) -> list[EncodedRow]:
        """Return the encoded rows of one item to train on."""
        return self.train.rows[index * self.width : (index + 1) * self.width]


def read_and_encode(data: DataSettings, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Rows:
    """Read the rows, hold some out, and encode both. Rows are told apart before encoding: a conversation stays on one side."""
    rows = read_rows(data.path, limit=data.limit)
    templates: dict[str, Any] = {"prompt_template": data.prompt, "completion_template": data.completion, "system": data.system}
    description = "columns through the templates of [data]" if data.prompt else sniff_format(rows.rows).description
    examples = to_examples(rows.rows, **templates)
    digest, digests = rows.digest, {"train": rows.digest}
    if data.eval_path is not None:
        held_out_rows = read_rows(data.eval_path)
        held_out = to_examples(held_out_rows.rows, **templates)
        digest = hashlib.sha256((digest + held_out_rows.digest).encode()).hexdigest()
        digests["eval"] = held_out_rows.digest
    else:
        train_index, held_out_index = split_rows(len(examples), data.eval_fraction, seed)
        held_out = [examples[index] for index in held_out_index]
        examples = [examples[index] for index in train_index]
    train_set = encode(examples, tokenizer, max_length=data.max_length)
    held_out_set = encode(held_out, tokenizer, max_length=data.max_length) if held_out else None
    return Rows(train_set, held_out_set, held_out, description, digest, digests)


def encode_file(path: Path, data: DataSettings, tokenizer: "PreTrainedTokenizerBase") -> EncodedSet:
    """Read and encode the rows of another file as those of `data` are."""
    templates: dict[str, Any] = {"prompt_template": data.prompt, "completion_template": data.completion, "system": data.system}
    return encode(to_examples(read_rows(path).rows, **templates), tokenizer, max_length=data.max_length)


def check_rows_fit(rows: Rows, model: "PreTrainedModel") -> None:
    """Raise ConfigError if a row is longer than the model can read, or ModelError if it has tokens the model does not have."""
    encoded = [*rows.train.rows, *(rows.held_out.rows if rows.held_out else [])]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row) for row in encoded)
    if room and longest > room:
        raise ConfigError(f"the longest row has {longest} tokens, this model reads {room} at most; set data.max_length to {room}")
    highest, known = max(max(row.input_ids) for row in encoded), model.get_input_embeddings().weight.shape[0]
    if highest >= known:
        raise ModelError(
            f"the tokenizer gives token {highest}, but the model knows {known} tokens: they do not belong together. "
            "Use the model's own tokenizer."
        )
