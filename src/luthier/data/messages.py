"""Rows to conversations: the second step of the road. Never sees a tokenizer.

A row becomes an `Example`: a tuple of messages with at least one answer, or one plain text. Every row is checked before
the first is used, and one DataError lists what is wrong with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core.errors import ConfigError, did_you_mean
from luthier.data.faults import RowFaults
from luthier.data.formats import RowFormat, named_format, sniff_format
from luthier.data.templates import RowTemplate

ROLES = ("system", "user", "assistant", "tool", "developer")

# ShareGPT's names for them.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}

# Parts of a message that would change the training text or its labels. Leaving them out in silence would train another task.
UNSUPPORTED_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking", "weight")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks, and what is said."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row made ready: a conversation, or else a plain text. `row` is its index among the rows, from 0."""

    row: int
    messages: tuple[Message, ...] = ()
    text: str | None = None


class RowFault(ValueError):
    """What is wrong with one row, in words that follow "row 17"; gathered by `to_examples`, never seen outside."""


def to_examples(
    rows: Sequence[Mapping[str, Any]],
    *,
    format: RowFormat | str | None = None,
    prompt_template: str | None = None,
    completion_template: str | None = None,
    system: str | None = None,
) -> list[Example]:
    """Return one Example per row, in order.

    format: a name or the answer of `sniff_format`, which is asked where none is given.
    prompt_template, completion_template: Jinja over a row's columns, in place of a format: what the user says and what
        the assistant answers. `tojson` keeps the order of keys and writes letters as they are.
    system: a system message for every row that has none of its own.
    Raises: DataError listing the rows that cannot be used; ConfigError for settings that contradict each other.
    """
    if (prompt_template is None) != (completion_template is None):
        missing = "completion_template" if completion_template is None else "prompt_template"
        raise ConfigError(f"prompt_template and completion_template go together; {missing} is missing.")
    if prompt_template is not None and completion_template is not None:
        if format is not None:
            raise ConfigError("format has no effect beside prompt_template and completion_template. Give one or the other.")
        build: Callable[[int, Mapping[str, Any]], Example] = _TemplateBuilder(prompt_template, completion_template).build
    else:
        form = named_format(format, rows) if isinstance(format, str) else format or sniff_format(rows)
        if form.kind == "text" and system is not None:
            raise ConfigError("system has no effect on plain text rows: they have no turns.")
        build = _FormatBuilder(form).build

    examples, faults = [], RowFaults()
    for index, row in enumerate(rows):
        try:
            examples.append(with_system(build(index, row), system))
        except RowFault as fault:
            faults.add(f"row {index}", str(fault))
    faults.raise_if_any(f"{len(rows) - len(examples)} of {len(rows)} rows cannot be used, counted from 0")
    if system is not None and not any(ex.messages[0] == Message("system", system) for ex in examples):
        raise ConfigError("system has no effect: every row brings a system message of its own.")
    return examples


class _TemplateBuilder:
    def __init__(self, prompt: str, completion: str) -> None:
        self._prompt = RowTemplate("prompt_template", prompt)
        self._completion = RowTemplate("completion_template", completion)

    def build(self, index: int, row: Mapping[str, Any]) -> Example:
        said = []
        for role, template in (("user", self._prompt), ("assistant", self._completion)):
            try:
                said.append(Message(role, to_text(template.render(row), f"{template.name} gives")))
            except ValueError as fault:
                raise RowFault(str(fault)) from None
        return Example(index, tuple(said))


class _FormatBuilder:
    def __init__(self, form: RowFormat) -> None:
        self._form = form

    def build(self, index: int, row: Mapping[str, Any]) -> Example:
        missing = [c for c in self._form.needed if row.get(c) is None]
        if missing:
            hints = "".join(did_you_mean(c, [k for k in row if k not in self._form.columns.values()]) for c in missing)
            raise RowFault(f"has no {', '.join(map(repr, missing))}.{hints}")
        parts = {part: row[c] for part, c in self._form.columns.items() if row.get(c) not in (None, "")}
        if self._form.kind == "text":
            return Example(index, text=to_text(parts.get("text", ""), f"has in '{self._form.columns['text']}'"))
        if self._form.kind == "messages":
            turns = _conversation(row[self._form.columns["messages"]], self._form.columns["messages"])
        else:
            turns = self._question_and_answer(parts)
        if "system" in parts:
            if turns[0].role == "system":
                raise RowFault("has a 'system' column and a system message; which one counts?")
            turns = [Message("system", to_text(parts["system"], "has in 'system'")), *turns]
        return Example(index, tuple(turns))

    def _question_and_answer(self, parts: Mapping[str, Any]) -> list[Message]:
        said = {
            part: to_text(parts.get(part, ""), f"has in '{self._form.columns[part]}'")
            for part in ("prompt", "input", "completion")
            if part in parts or part != "input"
        }
        asked = said["prompt"] + ("\n\n" + said["input"] if "input" in said else "")
        return [Message("user", asked), Message("assistant", said["completion"])]


def _conversation(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise RowFault(f"has in '{column}' {shown(turns)}; needed is a list of messages")
    said = [to_message(turn, index) for index, turn in enumerate(turns)]
    if not any(message.role == "assistant" for message in said):
        raise RowFault("has no assistant turn, so nothing to learn")
    if said[0].role == "assistant":
        raise RowFault("opens with the assistant; an answer needs a turn before it")
    return said


def to_message(turn: Any, index: int) -> Message:
    """Return one turn of a row, message `index` of its conversation. Raises: RowFault."""
    where = f"message {index}"
    if not isinstance(turn, Mapping):
        raise RowFault(f"{where} is {shown(turn)}; needed is {{'role': ..., 'content': ...}}")
    role_key, content_key = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    for key in (role_key, content_key):
        if turn.get(key) is None:
            raise RowFault(f"{where} has no '{key}'.{did_you_mean(key, map(str, turn))}")
    dropped = [part for part in UNSUPPORTED_PARTS if turn.get(part) not in (None, "", [], 1)]
    if dropped:
        raise RowFault(f"{where} has {', '.join(map(repr, dropped))}, which cannot be trained on yet")
    role = turn[role_key]
    role = SHAREGPT_ROLES.get(role, role) if isinstance(role, str) and role_key == "from" else role
    if role not in ROLES:
        raise RowFault(f"{where} has the role {turn[role_key]!r}; known are {', '.join(ROLES)}")
    return Message(role, to_text(turn[content_key], f"{where} has in '{content_key}'"))


def with_system(example: Example, system: str | None) -> Example:
    """Return the example with this system message, if it has none of its own."""
    if system is None or example.messages[0].role == "system":
        return example
    return Example(example.row, (Message("system", system), *example.messages))


def to_text(value: Any, where: str) -> str:
    """Return a value that must be a text with something in it. Raises: RowFault, which begins with `where`."""
    if not isinstance(value, str):
        raise RowFault(f"{where} {shown(value)}; needed is a string")
    if not value.strip():
        raise RowFault(f"{where} nothing: it is empty")
    return value


def shown(value: Any) -> str:
    """Return type and beginning of a value, for a message about it."""
    text = repr(value)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
