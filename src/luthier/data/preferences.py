"""Rows that say which answer is better: pairs (chosen, rejected), and answers marked good or bad. Never sees a tokenizer.

Recognised by their columns, as other rows are, and checked before the first is used. Only the last answer of a conversation is
judged, so what comes before it must be the same on both sides.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from luthier.core.errors import DataError, did_you_mean
from luthier.data.faults import RowFaults
from luthier.data.formats import columns_of
from luthier.data.messages import Example, Message, RowFault, shown, to_message, to_text, with_system

ASKED = ("prompt", "question", "instruction")
"""Columns that may hold the question, the first that a row has."""
ANSWERED = ("completion", "response", "output")
KNOWN = (
    "prompt (or question, instruction) + chosen + rejected: texts or lists of messages",
    "chosen + rejected: two conversations that differ in their last message",
    "prompt (or question, instruction) + completion (or response, output) + label (true or false)",
)

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pair:
    """One question with a better and a worse answer. `margin` says by how much it is better, where the row does."""

    row: int
    chosen: Example
    rejected: Example
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """One question with an answer that is good or bad."""

    row: int
    example: Example
    is_desirable: bool


def to_pairs(rows: Sequence[Row], *, system: str | None = None) -> tuple[list[Pair], str]:
    """Return the pairs of these rows, and a line for people: which columns they are, and what was left out.

    A pair whose two answers are the same prefers nothing; it is left out and counted. `system` as in `to_examples`.
    Raises: DataError listing the rows that cannot be used, or the columns where no row has those of a known form.
    """
    _check_columns(rows, [row for row in rows if "chosen" in row and "rejected" in row], "pairs")
    pairs = _built(rows, lambda index, row: _pair(index, row, system))
    differing = [pair for pair in pairs if pair.chosen.messages != pair.rejected.messages]
    if not differing:
        raise DataError(f"in all {len(pairs)} rows the chosen and the rejected answer are the same, so nothing is preferred")
    columns = ["chosen", "rejected", *(["margin"] if any(pair.margin is not None for pair in pairs) else [])]
    return differing, _line(rows, columns, f"{len(pairs):,} pairs", len(pairs) - len(differing))


def to_marked(rows: Sequence[Row], *, system: str | None = None) -> tuple[list[Marked], str]:
    """Return answers marked good or bad, and a line for people. A pair is two of them: its chosen answer and its rejected one.

    Raises: DataError as `to_pairs`, and where all are marked alike.
    """
    if any("chosen" in row and "rejected" in row for row in rows):
        pairs, line = to_pairs(rows, system=system)
        marked = [Marked(pair.row, side, side is pair.chosen) for pair in pairs for side in (pair.chosen, pair.rejected)]
        return marked, f"{line}; each taken as one good and one bad answer"
    _check_columns(rows, [row for row in rows if "label" in row and _first(row, ANSWERED)], "marked answers")
    marked = _built(rows, lambda index, row: _marked(index, row, system))
    good = sum(one.is_desirable for one in marked)
    if good in (0, len(marked)):
        raise DataError(f"all {len(marked)} rows have the label {good > 0}; a preference needs good answers and bad ones")
    columns = [next(column for row in rows if (column := _first(row, ANSWERED))), "label"]
    return marked, _line(rows, columns, f"{good:,} good answers, {len(marked) - good:,} bad", 0)


def _pair(index: int, row: Row, system: str | None) -> Pair:
    asked = _first(row, ASKED)
    before = _question(row[asked], asked) if asked else None
    sides = []
    for column in ("chosen", "rejected"):
        if row.get(column) is None:
            raise RowFault(f"has no '{column}'.{did_you_mean(column, list(row))}")
        sides.append(_side(row[column], column, before))
    chosen, rejected = sides
    if chosen[:-1] != rejected[:-1]:
        raise RowFault(
            f"parts before the last answer: {len(chosen)} messages in 'chosen', {len(rejected)} in 'rejected', of which the "
            f"first {_shared(chosen, rejected)} are the same; only the last may differ"
        )
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)):
        raise RowFault(f"has in 'margin' {shown(margin)}; needed is a number")
    examples = [with_system(Example(index, tuple(side)), system) for side in sides]
    return Pair(index, examples[0], examples[1], None if margin is None else float(margin))


def _marked(index: int, row: Row, system: str | None) -> Marked:
    asked, answered = _first(row, ASKED), _first(row, ANSWERED)
    if answered is None:
        raise RowFault(f"has no 'completion'.{did_you_mean('completion', list(row))}")
    label = row.get("label")
    if label not in (0, 1):  # True and False too
        raise RowFault(f"has in 'label' {shown(label)}; needed is true or false")
    turns = _side(row[answered], answered, _question(row[asked], asked) if asked else None)
    return Marked(index, with_system(Example(index, tuple(turns)), system), bool(label))


def _question(value: Any, column: str) -> list[Message]:
    """Return what comes before the answer."""
    if isinstance(value, str):
        return [Message("user", to_text(value, f"has in '{column}'"))]
    turns = _turns(value, column)
    if turns[-1].role == "assistant":
        raise RowFault(f"has a '{column}' that ends with the assistant; the answers stand beside it")
    return turns


def _side(value: Any, column: str, before: list[Message] | None) -> list[Message]:
    """Return a whole conversation, up to the answer that is judged."""
    if isinstance(value, str):
        if before is None:
            raise RowFault(f"has a text in '{column}' and no 'prompt'; a text alone does not say where its answer begins")
        return [*before, Message("assistant", to_text(value, f"has in '{column}'"))]
    turns = _turns(value, column)
    if turns[-1].role != "assistant":
        raise RowFault(f"has a '{column}' that ends with the role {turns[-1].role!r}; needed is an answer of the assistant")
    if before is None or turns[: len(before)] == before:
        if len(turns) < 2:
            raise RowFault(f"has an answer in '{column}' and no question before it")
        return turns
    if len(turns) > 1:
        raise RowFault(f"has {len(turns)} messages in '{column}' that do not begin with the prompt")
    return [*before, *turns]


def _turns(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RowFault(f"has in '{column}' {shown(value)}; needed is a text or a list of messages")
    try:
        return [to_message(turn, place) for place, turn in enumerate(value)]
    except RowFault as fault:
        raise RowFault(f"in '{column}': {fault}") from None


def _built(rows: Sequence[Row], build: Callable[[int, Row], T]) -> list[T]:
    made: list[T] = []
    faults = RowFaults()
    for index, row in enumerate(rows):
        try:
            made.append(build(index, row))
        except RowFault as fault:
            faults.add(f"row {index}", str(fault))
    faults.raise_if_any(f"{len(rows) - len(made)} of {len(rows)} rows cannot be used, counted from 0")
    return made


def _check_columns(rows: Sequence[Row], fitting: Sequence[Row], what: str) -> None:
    if not rows:
        raise DataError("There are no rows to find a format in.")
    if not fitting:
        known = "\n".join(f"  {form}" for form in KNOWN)
        raise DataError(
            f"None of the {len(rows)} rows holds {what}. Columns found: {', '.join(map(repr, columns_of(rows))) or 'none'}.\n"
            f"Known forms of preferences:\n{known}\nRename the columns, or choose another objective."
        )


def _line(rows: Sequence[Row], columns: Sequence[str], counted: str, same: int) -> str:
    asked = next((column for row in rows if (column := _first(row, ASKED))), None)
    used = [*([asked] if asked else []), *columns]
    says = [f"columns {', '.join(map(repr, used))} -> preferences", counted]
    says += [f"{same:,} left out whose answers are the same"] if same else []
    unused = [repr(column) for column in columns_of(rows) if column not in used]
    return ", ".join(says) + (f"; not used: {', '.join(unused)}" if unused else "")


def _first(row: Row, columns: Sequence[str]) -> str | None:
    return next((column for column in columns if row.get(column) is not None), None)


def _shared(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Return how many messages are the same from the beginning."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
