"""The rows of a run that learns from rewards: prompts to be answered, with room for the answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, DataError
from luthier.data.batches import padded_length
from luthier.data.coverage import LabelCoverage, nearest_rank
from luthier.data.encode import UNLABELLED, EncodedRow, EncodedSet, render_prompt
from luthier.data.prompts import Prompt, to_prompts
from luthier.data.read import RowSet
from luthier.train.objectives.settings import RolloutSettings
from luthier.train.rows import Rows, read_sides

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.settings import RunSettings


@dataclass
class PromptRows(Rows):
    """Prompts. Each encoded row is a prompt and one labelled stop token, which stands for the answer."""

    prompts: list[Prompt] = field(default_factory=list)
    held_out_prompts: list[Prompt] = field(default_factory=list)
    group: int = 1
    max_new_tokens: int = 1
    batch_tokens: int = 1

    @property
    def item_lengths(self) -> list[int]:
        """Tokens that a group of answers to each prompt may have, prompts included."""
        return [self.group * (length - 1 + self.max_new_tokens) for length in self.train.lengths]

    @property
    def longest(self) -> int:
        return super().longest - 1 + self.max_new_tokens

    def item(self, index: int) -> list[EncodedRow]:
        """Return as many longest answers to a prompt as go through the model at once: by this memory and time are reckoned."""
        row = self.train.rows[index]
        stop, prompt = row.input_ids[-1], row.input_ids[:-1]
        answer = [stop] * self.max_new_tokens
        full = EncodedRow(row.row, [*prompt, *answer], [UNLABELLED] * len(prompt) + answer)
        return [full] * max(1, self.batch_tokens // padded_length(len(full), 8))


def read_prompts(settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> PromptRows:
    """Read and encode prompts; those longer than data.max_length are dropped and counted. Raises: DataError, ConfigError."""
    data, objective = settings.data, settings.objective
    assert isinstance(objective, RolloutSettings)
    if data.completion is not None:
        raise ConfigError(f"data.completion has no effect with objective {objective.kind!r}: the model answers; leave it out")

    def make(rows: RowSet) -> tuple[list[Prompt], str]:
        found = to_prompts(rows.rows, prompt_template=data.prompt, system=data.system)
        return found, f"{len(found):,} prompts; rewards are given the rows whole"

    sides = read_sides(data, settings.train.seed, make)
    prompts, train_set = _encoded(sides.train, tokenizer, data.max_length)
    held_out, held_out_set = _encoded(sides.held_out, tokenizer, data.max_length) if sides.held_out else ([], None)
    examples = [prompt.example for prompt in held_out]
    return PromptRows(
        train_set,
        held_out_set,
        examples,
        sides.description,
        sides.digest,
        sides.digests,
        prompts=prompts,
        held_out_prompts=held_out,
        group=objective.num_generations,
        max_new_tokens=objective.max_new_tokens,
        batch_tokens=settings.train.batch_tokens,
    )


def _encoded(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> tuple[list[Prompt], EncodedSet]:
    stop = tokenizer.eos_token_id
    if not isinstance(stop, int):
        raise DataError("The tokenizer has no token that ends an answer, so answers would never end. Set tokenizer.eos_token.")
    ids = [render_prompt(prompt.example, tokenizer) for prompt in prompts]
    kept = [place for place, each in enumerate(ids) if len(each) <= max_length]
    if not kept:
        raise DataError(f"All {len(ids)} prompts are longer than max_length={max_length}; the shortest has {min(map(len, ids))}.")
    rows = [
        EncodedRow(prompts[place].example.row, [*ids[place], stop], [UNLABELLED] * len(ids[place]) + [stop]) for place in kept
    ]
    lengths = sorted(len(row) for row in rows)
    report = LabelCoverage(
        rows=len(rows),
        dropped=len(ids) - len(kept),
        truncated=0,
        split_turns=0,
        tokens=sum(lengths),
        labelled_tokens=len(rows),
        share=len(rows) / sum(lengths),
        length_p50=nearest_rank(lengths, 0.50),
        length_p95=nearest_rank(lengths, 0.95),
        length_max=lengths[-1],
        stop_token=str(tokenizer.eos_token),
        rows_with_stop=len(rows),
        control_text_rows=0,
    )
    return [prompts[place] for place in kept], EncodedSet(rows, report)
