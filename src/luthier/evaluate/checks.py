"""Does an answer keep to a form? Checks that a program can decide, by name: what format suites and IFEval are made of.

A check is a table: {check = "words", at_least = 300}, {check = "contains", text = "ocean", at_most = 0}. Counts take `at_least`,
`at_most` or both; `exactly` is short for both. White space around an answer is not looked at. Pure functions on text, no torch.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, validate_call

from luthier.core.errors import did_you_mean
from luthier.evaluate.metrics import INVALID, parse_json

Count = Annotated[int, Field(ge=0)] | None
Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True)
class Check:
    """One check with its arguments, which are known to be good."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def holds(self, answer: str) -> bool:
        """Whether the answer passes."""
        return bool(CHECKS[self.name](answer.strip(), **dict(self.arguments)))


def read_checks(tables: Sequence[Any]) -> tuple[Check, ...]:
    """Return the checks that these tables describe. Raises: ValueError with all that is wrong, in words that follow "row 17"."""
    found, faults = [], []
    for place, table in enumerate(tables):
        try:
            found.append(_read_check(table))
        except ValueError as fault:
            faults.append(f"check {place} {fault}")
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(found)


def _read_check(table: Any) -> Check:
    name = table.get("check") if isinstance(table, Mapping) else None
    if not isinstance(name, str):
        raise ValueError(f"is {table!r}; needed is a table with a name, such as {{'check': 'words', 'at_least': 3}}")
    if name not in CHECKS:
        raise ValueError(f"is called {name!r}.{did_you_mean(name, CHECKS)} Known: {', '.join(CHECKS)}")
    arguments = {key: value for key, value in table.items() if key != "check"}
    try:
        CHECKS[name]("", **arguments)  # a text on which every check ends, to have its arguments looked at
    except ValidationError as error:
        known = [each for each in inspect.signature(CHECKS[name]).parameters if each != "answer"]
        told = [
            f"has no argument {fault['loc'][0]!r} (it has {', '.join(known)})"
            if fault["type"] == "unexpected_keyword_argument"
            else f"{fault['loc'][0]}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise ValueError(f"({name}) {'; '.join(told)}") from None
    except (ValueError, re.error) as fault:
        raise ValueError(f"({name}) {fault}") from None
    return Check(name, tuple(sorted(arguments.items())))


def _is_counted(count: int, at_least: int | None, at_most: int | None, exactly: int | None) -> bool:
    if exactly is not None and not (at_least is None and at_most is None):
        raise ValueError("takes exactly, or at_least and at_most")
    if at_least is None and at_most is None and exactly is None:
        at_least = 1
    low, high = (at_least, at_most) if exactly is None else (exactly, exactly)
    if low is not None and high is not None and low > high:
        raise ValueError(f"at_least = {low} is more than at_most = {high}")
    return (low is None or count >= low) and (high is None or count <= high)


def words(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of words: runs of letters, digits and underscores."""
    return _is_counted(len(re.findall(r"\w+", answer)), at_least, at_most, exactly)


def capital_words(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of words in capital letters throughout; a single letter such as I is one."""
    capitals = [word for word in re.findall(r"[\w'-]+", answer) if word.isupper()]
    return _is_counted(len(capitals), at_least, at_most, exactly)


def sentences(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of sentences: a sentence ends at . ! or ? before white space, or where the text ends. Abbreviations fool it."""
    parts = [part for part in re.split(r"(?<=[.!?])[\"')\]*]*\s+", answer) if re.search(r"\w", part)]
    return _is_counted(len(parts), at_least, at_most, exactly)


def characters(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of characters."""
    return _is_counted(len(answer), at_least, at_most, exactly)


def lines(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of lines that are not empty."""
    return _is_counted(sum(bool(line.strip()) for line in answer.split("\n")), at_least, at_most, exactly)


def bullets(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of lines that begin with * or -, as Markdown's lists do."""
    return _is_counted(len(re.findall(r"^\s*(?:\*[^*]|-).*$", answer, re.MULTILINE)), at_least, at_most, exactly)


def parts(
    answer: str, separator: Text, at_least: Count = None, at_most: Count = None, exactly: Count = None, distinct: bool = False
) -> bool:
    """The number of parts between separators; an empty one is allowed at either end and not counted, elsewhere it fails."""
    found = [part.strip() for part in answer.split(separator)]
    inner = found[1:-1]
    filled = [part for part in found if part]
    is_distinct = not distinct or len(set(filled)) == len(filled)
    return _is_counted(len(filled), at_least, at_most, exactly) and all(inner) and is_distinct


def paragraphs(answer: str, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """The number of paragraphs, which an empty line separates."""
    return _is_counted(len(_paragraphs(answer)), at_least, at_most, exactly)


def paragraph_begins(answer: str, paragraph: Annotated[int, Field(ge=1)], word: Text) -> bool:
    """The first word of a paragraph, counted from 1; upper and lower case are the same."""
    found = _paragraphs(answer)
    first = re.match(r"[\"'*_(]*([^\s.,?!'\"]+)", found[paragraph - 1]) if paragraph <= len(found) else None
    return first is not None and first[1].casefold() == word.strip().casefold()


def contains(
    answer: str,
    text: Text,
    at_least: Count = None,
    at_most: Count = None,
    exactly: Count = None,
    case_folded: bool = False,
    whole_words: bool = False,
) -> bool:
    """How often a text is in the answer; once or more if nothing else is said, never with `at_most = 0`."""
    pattern = rf"\b{re.escape(text)}\b" if whole_words else re.escape(text)
    found = re.findall(pattern, answer, re.IGNORECASE if case_folded else 0)
    return _is_counted(len(found), at_least, at_most, exactly)


def matches(answer: str, pattern: Text, at_least: Count = None, at_most: Count = None, exactly: Count = None) -> bool:
    """How often a regular expression matches; ^ and $ are the ends of the answer unless it says (?m)."""
    return _is_counted(sum(1 for _ in re.finditer(pattern, answer)), at_least, at_most, exactly)


def starts(answer: str, text: Text, case_folded: bool = False) -> bool:
    """What the answer begins with."""
    return answer.casefold().startswith(text.strip().casefold()) if case_folded else answer.startswith(text.strip())


def ends(answer: str, text: Text, case_folded: bool = False) -> bool:
    """What the answer ends with."""
    return answer.casefold().endswith(text.strip().casefold()) if case_folded else answer.endswith(text.strip())


def case(answer: str, letters: Literal["lower", "upper"]) -> bool:
    """All letters are small, or all are capital."""
    return answer.islower() if letters == "lower" else answer.isupper()


def is_json(answer: str, keys: list[Text] | None = None, fenced: bool = False) -> bool:
    """The whole answer is one JSON value, with these keys if it must have some; `fenced` allows a Markdown fence around it."""
    if fenced:
        answer = re.sub(r"\A```\w*\s*|\s*```\Z", "", answer)
    value = parse_json(answer)
    return value is not INVALID and (not keys or (isinstance(value, dict) and value.keys() >= set(keys)))


def _paragraphs(answer: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", answer) if part.strip()]


_DECIDED_BY: dict[str, Callable[..., bool]] = {
    "words": words,
    "capital-words": capital_words,
    "sentences": sentences,
    "characters": characters,
    "lines": lines,
    "bullets": bullets,
    "parts": parts,
    "paragraphs": paragraphs,
    "paragraph-begins": paragraph_begins,
    "contains": contains,
    "matches": matches,
    "starts": starts,
    "ends": ends,
    "case": case,
    "json": is_json,
}
CHECKS = {name: validate_call(config=ConfigDict(strict=True))(decides) for name, decides in _DECIDED_BY.items()}
"""Name -> what decides it, its arguments checked. They are the function's own, and of the types it names."""
