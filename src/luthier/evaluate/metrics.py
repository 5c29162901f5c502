"""Was the answer right? Exact match of the text, and of the JSON value field by field.

Pure functions on strings, no torch. What counts as equal:

- text: with white space at both ends stripped, the same characters;
- JSON values: the same value. Key order does not matter, list order does. 1 and 1.0 are equal, for JSON knows one kind of
  number; true and 1 are not. An output is JSON if the whole of it is one value by the grammar of RFC 8259: no prose or code
  fence around it, no NaN or Infinity. An object that says one key twice is still JSON there ("names SHOULD be unique"), but
  what it says under that key is anyone's guess: that value equals nothing, so neither does the object. Such outputs are counted.

With `case_folded` upper and lower case are the same in text and in JSON strings, but not in keys: keys are the schema.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from luthier.core.errors import DataError
from luthier.evaluate.statistics import Share, share


class _NoValue:
    """What stands where there is no value, and equals nothing; not None, because null is a JSON value."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


INVALID = _NoValue("INVALID")
REPEATED = _NoValue("REPEATED")
"""The value of a key that its object says more than once."""

NUMBER = re.compile(r"-?\$?\d(?:[\d,]*\d)?(?:\.\d+)?")


@dataclass(frozen=True)
class PairScores:
    """The key-value pairs of one object-valued field, counted over all rows together (micro average).

    Pairs of one row are not independent, so the intervals are a little too narrow.
    """

    precision: Share
    recall: Share
    f1: float


@dataclass(frozen=True)
class JsonScores:
    """How well outputs match JSON references.

    `valid`: outputs that are JSON. `repeating`: outputs that are JSON and say some key twice. `exact`: outputs whose value
    equals the reference's; not JSON is a miss. `fields`: for each top-level key of the references, the share of the references
    having it where the output has the same value under it. `pairs`: for each top-level field that holds objects, how many of
    their key-value pairs were found.
    """

    valid: Share
    repeating: Share
    exact: Share
    fields: dict[str, Share] = field(default_factory=dict)
    pairs: dict[str, PairScores] = field(default_factory=dict)


def exact_match(output: str, reference: str, *, case_folded: bool = False) -> bool:
    """Whether two texts are the same, white space at both ends aside."""
    return same_value(output.strip(), reference.strip(), case_folded=case_folded)


def json_scores(outputs: Sequence[str], references: Sequence[str], *, case_folded: bool = False) -> JsonScores:
    """Compare outputs with references that are JSON, row by row. Raises: DataError naming the references that are not JSON."""
    if len(outputs) != len(references):
        raise DataError(f"{len(outputs)} outputs and {len(references)} references; one of each per row is needed")
    given = [parse_json(output) for output in outputs]
    wanted = [parse_json(reference) for reference in references]
    if faults := [row for row, value in enumerate(wanted) if value is INVALID or says_a_key_twice(value)]:
        raise DataError(
            f"{len(faults)} of {len(wanted)} references are not JSON without repeated keys, the first in row {faults[0]}: "
            f"{references[faults[0]][:80]!r}"
        )
    rows = list(zip(given, wanted, strict=True))
    objects = [(got if isinstance(got, dict) else {}, want) for got, want in rows if isinstance(want, dict)]
    keys = list(dict.fromkeys(key for _, want in objects for key in want))
    return JsonScores(
        valid=share(sum(value is not INVALID for value in given), len(given)),
        repeating=share(sum(map(says_a_key_twice, given)), len(given)),
        exact=share(sum(same_value(got, want, case_folded=case_folded) for got, want in rows), len(rows)),
        fields={key: _field_score(objects, key, case_folded) for key in keys},
        pairs={key: scores for key in keys if (scores := _pair_scores(objects, key, case_folded)) is not None},
    )


def is_json_container(text: str) -> bool:
    """Whether a text is a JSON object or array; bare numbers and words are better judged as text."""
    value = parse_json(text)
    return isinstance(value, dict | list) and not says_a_key_twice(value)


def number_in(text: str) -> Decimal | None:
    """Return the value of the last number in a text: thousands may have commas, a dollar sign may stand before it."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "")) if found else None


def parse_json(text: str) -> Any:
    """Return the one JSON value that `text` is, or INVALID. Numbers come as int or Decimal, so no digit is lost.

    A key that an object says more than once has the value REPEATED there.
    """
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except (ValueError, ArithmeticError, RecursionError):  # malformed; a number beyond Decimal; nested without end
        return INVALID


def says_a_key_twice(value: Any) -> bool:
    """Whether an object anywhere in a parsed JSON value has the same key more than once."""
    unseen = [value]
    while unseen:
        item = unseen.pop()
        if item is REPEATED:
            return True
        if isinstance(item, dict | list):
            unseen += item.values() if isinstance(item, dict) else item
    return False


def same_value(left: Any, right: Any, *, case_folded: bool = False) -> bool:
    """Whether two parsed JSON values are equal as this file's head defines it. INVALID and REPEATED equal nothing."""
    if isinstance(left, _NoValue) or isinstance(right, _NoValue):
        return False
    if isinstance(left, str) and isinstance(right, str):
        return left.casefold() == right.casefold() if case_folded else left == right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_value(left[key], right[key], case_folded=case_folded) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(
            same_value(one, other, case_folded=case_folded) for one, other in zip(left, right, strict=True)
        )
    if isinstance(left, bool) or isinstance(right, bool):  # Python's True == 1, JSON's does not
        return left is right
    return bool(left == right)


def _field_score(objects: list[tuple[dict, dict]], key: str, case_folded: bool) -> Share:
    having = [(got, want) for got, want in objects if key in want]
    hits = sum(key in got and same_value(got[key], want[key], case_folded=case_folded) for got, want in having)
    return share(hits, len(having))


def _pair_scores(objects: list[tuple[dict, dict]], key: str, case_folded: bool) -> PairScores | None:
    """None for a field that no reference fills with an object, and where there is no pair on either side to count."""
    if not any(isinstance(want.get(key), dict) for _, want in objects):
        return None
    found = given = wanted = 0
    for got, want in objects:
        got_pairs = got[key] if isinstance(got.get(key), dict) else {}
        want_pairs = want[key] if isinstance(want.get(key), dict) else {}
        given += len(got_pairs)
        wanted += len(want_pairs)
        found += sum(
            name in got_pairs and same_value(got_pairs[name], value, case_folded=case_folded)
            for name, value in want_pairs.items()
        )
    if given + wanted == 0:
        return None
    return PairScores(precision=share(found, given), recall=share(found, wanted), f1=2 * found / (given + wanted))


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        value[key] = REPEATED if key in value else item
    return value
