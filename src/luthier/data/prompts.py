"""Rows to prompts: what a model is asked, whether or not the row has an answer. Never sees a tokenizer.

Any format that `to_examples` knows, of which the last answer is left out; and the same without an answer: a column `prompt` (a
text or a list of messages), `question`, `instruction`, or `messages` that end with a turn of the user's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.messages import Example, Message, to_examples

PLACEHOLDER = "-"
"""Stands for the answer that a row does not have; nobody is shown it."""
ANSWERS = {"prompt": ("completion", "response"), "question": ("answer",), "instruction": ("output",)}
"""Columns that ask, and those that answer them."""


@dataclass(frozen=True)
class Prompt:
    """What is asked, as an example whose last answer counts for nothing, and the whole row, by which an answer may be judged."""

    example: Example
    row: dict[str, Any]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns before the last answer."""
        return [{"role": each.role, "content": each.content} for each in self.turns]

    @property
    def turns(self) -> tuple[Message, ...]:
        """What is said before the last answer."""
        said = self.example.messages
        last = max(place for place, message in enumerate(said) if message.role == "assistant")
        return said[:last]


def to_prompts(
    rows: Sequence[Mapping[str, Any]], *, prompt_template: str | None = None, system: str | None = None
) -> list[Prompt]:
    """Return one Prompt per row, in order. Raises: DataError listing the rows that cannot be used."""
    if prompt_template is not None:
        examples = to_examples(rows, prompt_template=prompt_template, completion_template=PLACEHOLDER, system=system)
    else:
        examples = to_examples([_answered(row) for row in rows], system=system)
    return [Prompt(example, dict(rows[example.row])) for example in examples]


def _answered(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a row that has an answer, if need be a placeholder."""
    turns = row.get("messages") or row.get("prompt")
    if isinstance(turns, list):
        last = turns[-1] if turns else None
        is_answered = isinstance(last, Mapping) and last.get("role") == "assistant"
        return {"messages": turns if is_answered else [*turns, {"role": "assistant", "content": PLACEHOLDER}]}
    for asking, answering in ANSWERS.items():
        if row.get(asking) is not None and not any(row.get(column) for column in answering):
            return {**row, answering[0]: PLACEHOLDER}
    return row
