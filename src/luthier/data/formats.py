"""Which columns of the rows speak for whom: recognised by name, told to the user in a line. Never reads a row's text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from luthier.core.errors import ConfigError, DataError, did_you_mean

Kind = Literal["messages", "prompt+completion", "text"]


@dataclass(frozen=True)
class RowFormat:
    """How a row becomes a conversation: `kind`, and which column plays which part.

    `columns` maps a part (messages, text, prompt, input, completion, system) to the column that holds it; `optional`
    names the parts a row may lack. `description` is the line shown to the user.
    """

    name: str
    kind: Kind
    columns: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    description: str = ""

    @property
    def needed(self) -> list[str]:
        """The columns every row must have."""
        return [column for part, column in self.columns.items() if part not in self.optional]


_SYSTEM = frozenset({"system"})

# In this order where a row suits several: the one that says most comes first.
KNOWN_FORMATS: dict[str, RowFormat] = {
    form.name: form
    for form in (
        RowFormat("messages", "messages", {"messages": "messages"}),
        RowFormat("conversations", "messages", {"messages": "conversations", "system": "system"}, _SYSTEM),
        RowFormat("prompt+completion", "prompt+completion", {"prompt": "prompt", "completion": "completion"}),
        RowFormat("prompt+response", "prompt+completion", {"prompt": "prompt", "completion": "response"}),
        RowFormat(
            "instruction+output",
            "prompt+completion",
            {"system": "system", "prompt": "instruction", "input": "input", "completion": "output"},
            frozenset({"input", "system"}),
        ),
        RowFormat("question+answer", "prompt+completion", {"prompt": "question", "completion": "answer"}),
        RowFormat("text", "text", {"text": "text"}),
    )
}

_SPOKEN_BY = {"system": "system", "prompt": "user", "input": "user (below it, where not empty)", "completion": "assistant"}


def sniff_format(rows: Sequence[Mapping[str, Any]]) -> RowFormat:
    """Return the known format that most rows have the columns for, described for people.

    Rows that lack them are `to_examples`' business. Raises: DataError where no row suits any format; it lists the
    columns that exist and the formats that are known.
    """
    if not rows:
        raise DataError("There are no rows to find a format in.")
    fitting = {name: sum(all(c in row for c in form.needed) for row in rows) for name, form in KNOWN_FORMATS.items()}
    best = max(fitting, key=fitting.__getitem__)  # the first of equals
    if not fitting[best]:
        raise DataError(_nothing_fits(rows))
    return describe(KNOWN_FORMATS[best], rows)


def named_format(name: str, rows: Sequence[Mapping[str, Any]]) -> RowFormat:
    """Return the known format of that name, described for these rows."""
    if name not in KNOWN_FORMATS:
        hint = did_you_mean(name, KNOWN_FORMATS)
        raise ConfigError(f"There is no row format '{name}'.{hint} Known: {', '.join(KNOWN_FORMATS)}.")
    return describe(KNOWN_FORMATS[name], rows)


def describe(form: RowFormat, rows: Sequence[Mapping[str, Any]]) -> RowFormat:
    """Return `form` without the optional columns no row has, and with its line: who says what, and what is not used."""
    present = columns_of(rows)
    columns = {part: c for part, c in form.columns.items() if c in present or part not in form.optional}
    if form.kind == "messages":
        says = [f"column '{columns['messages']}' -> messages"]
        says += [f"column '{c}' -> system" for part, c in columns.items() if part == "system"]
    elif form.kind == "text":
        says = [f"column '{columns['text']}' -> plain text, every token trained"]
    else:
        says = [f"column '{column}' -> {_SPOKEN_BY[part]}" for part, column in columns.items()]
    unused = [repr(c) for c in present if c not in columns.values()]
    says.append(f"{len(rows):,} row{'s' if len(rows) != 1 else ''}")
    line = ", ".join(says) + (f"; not used: {', '.join(unused)}" if unused else "")
    return RowFormat(form.name, form.kind, columns, form.optional, line)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every column name, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def _nothing_fits(rows: Sequence[Mapping[str, Any]]) -> str:
    known = "\n".join(f"  {' + '.join(form.needed)}" for form in KNOWN_FORMATS.values())
    return (
        f"None of the {len(rows)} rows has the columns of a known format. "
        f"Columns found: {', '.join(map(repr, columns_of(rows))) or 'none'}.\nKnown formats:\n{known}\n"
        "Rename the columns, or say how to build the two sides with prompt_template and completion_template, "
        "for instance prompt_template='Translate: {{ english }}', completion_template='{{ french }}'."
    )
