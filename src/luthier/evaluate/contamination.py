"""Has the adapter been trained on what it is asked? Looks for the texts of suite items in training rows.

Texts are compared as runs of words: letters and digits in small letters, and the signs of sums; white space and other punctuation
do not count. An item is in a row if they have 13 words in a row in common (Brown et al. 2020, appendix C, arXiv:2005.14165, used
the same kind of measure). A text of fewer words has to be in the row as a whole, and one of fewer than 5 says too little: what is
only made of such texts is counted as not checked. A run that more than 10 items share, or more than half of them, belongs to
the wording of the suite (an instruction, a worked example) and says nothing about one of them.

Runs are compared as text, not as hashes, so there are no false hits by collision; those of the suites are in memory, those of
one training row at a time. What was said in other words is not found. No torch; never decides what follows from an overlap.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from luthier.evaluate.items import ChoiceItem, GenerateItem, Item
from luthier.evaluate.suites import Suite

RUN = 13
SHORTEST = 5
SHARED_BY = 10
ROWS_NAMED = 5
WORD = re.compile(r"[^\W_]+|[+*=]|-(?= ?\d)")
ROLE_KEYS = frozenset({"role", "from"})  # of chat rows: their values are no text


@dataclass(frozen=True)
class Overlap:
    """An item that training rows contain. `rows` names the first of `num_rows`, from 0; `share` of the item's runs were found."""

    item: str
    rows: tuple[int, ...]
    num_rows: int
    share: float


@dataclass(frozen=True)
class SuiteOverlap:
    """What of one suite is in the training rows. `unchecked` items have no text that is long enough and their own."""

    suite: str
    digest: str
    items: int
    unchecked: int
    overlaps: tuple[Overlap, ...]

    @property
    def item_ids(self) -> frozenset[str]:
        """The items to leave out or to flag."""
        return frozenset(overlap.item for overlap in self.overlaps)

    @property
    def share(self) -> float:
        """How many of the checked items are in the training rows, from 0 to 1."""
        checked = self.items - self.unchecked
        return len(self.overlaps) / checked if checked else 0.0


@dataclass(frozen=True)
class Contamination:
    """What of some suites is in the training rows, of which there were `rows`."""

    rows: int
    suites: tuple[SuiteOverlap, ...]

    @property
    def item_ids(self) -> dict[str, frozenset[str]]:
        """The items that are in the training rows, by suite: what the gate leaves out. Suites without any are not named."""
        return {found.suite: found.item_ids for found in self.suites if found.overlaps}

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with each suite's `share`."""
        return {"rows": self.rows, "suites": [{**asdict(found), "share": found.share} for found in self.suites]}


def find_contamination(
    rows: Iterable[Mapping[str, Any] | str],
    suites: Sequence[Suite],
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Contamination:
    """Look for every item of the suites in every training row. Rows may come from a generator: each is looked at once.

    A row is all its texts one after another, those of nested values too. `on_progress` is called with the rows done.
    """
    index = _Index(suites)
    done = 0
    for done, row in enumerate(rows, start=1):
        index.look_into(done - 1, row if isinstance(row, str) else " \n ".join(_texts(row)))
        if on_progress is not None:
            on_progress(done)
    return Contamination(done, tuple(index.found(place) for place in range(len(suites))))


def words_of(text: str) -> list[str]:
    """Return the words of a text as they are compared."""
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def passages(item: Item) -> tuple[str, ...]:
    """Return the texts of an item whose presence in a training row would give it away.

    Of a choice that is the prompt, and the prompt followed by the right option: wrong options are often ordinary words. Of a
    request it is the prompt: short answers such as a label are rightly the same in many rows.
    """
    if isinstance(item, ChoiceItem):
        return (item.prompt, f"{item.prompt} {item.options[item.answer]}")
    return (item.prompt,) if isinstance(item, GenerateItem) else item.texts


def runs_of(text: str) -> set[str]:
    """Return the runs of 13 words of a text, or the whole of a shorter one; nothing if it has fewer than 5 words."""
    words = words_of(text)
    if len(words) < SHORTEST:
        return set()
    return {" ".join(words[start : start + RUN]) for start in range(max(1, len(words) - RUN + 1))}


@dataclass
class _Found:
    """What is known of one item so far."""

    runs: int
    seen: set[str] = field(default_factory=set)
    rows: list[int] = field(default_factory=list)
    num_rows: int = 0


class _Index:
    """The runs of all suites, and which item each belongs to."""

    def __init__(self, suites: Sequence[Suite]) -> None:
        self._suites = suites
        self._items: dict[tuple[int, str], _Found] = {}
        self._owners: dict[str, list[tuple[int, str]]] = {}
        for place, suite in enumerate(suites):
            runs = {item.id: set[str]().union(*map(runs_of, passages(item))) for item in suite.items}
            sharing = Counter(run for own in runs.values() for run in own)
            most = min(SHARED_BY, max(1, len(runs) // 2))
            for name, own in runs.items():
                kept = [run for run in own if sharing[run] <= most]
                self._items[place, name] = _Found(len(kept))
                for run in kept:
                    self._owners.setdefault(run, []).append((place, name))
        split = [run.split(" ") for run in self._owners]
        self._heads = {" ".join(words[:SHORTEST]) for words in split}
        self._lengths = sorted({len(words) for words in split})

    def look_into(self, number: int, text: str) -> None:
        """Note which items are in the text of one row."""
        words = words_of(text)
        here: dict[tuple[int, str], None] = {}
        for start in range(len(words) - SHORTEST + 1):
            # Most places end here: no run of any suite begins with these five words.
            if " ".join(words[start : start + SHORTEST]) not in self._heads:
                continue
            for length in self._lengths:
                run = " ".join(words[start : start + length])
                for owner in self._owners.get(run, ()):
                    self._items[owner].seen.add(run)
                    here[owner] = None
        for owner in here:
            found = self._items[owner]
            found.num_rows += 1
            if len(found.rows) < ROWS_NAMED:
                found.rows.append(number)

    def found(self, place: int) -> SuiteOverlap:
        """Return what was found of one suite."""
        suite = self._suites[place]
        known = {item.id: self._items[place, item.id] for item in suite.items}
        overlaps = tuple(
            Overlap(name, tuple(one.rows), one.num_rows, len(one.seen) / one.runs) for name, one in known.items() if one.num_rows
        )
        return SuiteOverlap(suite.name, suite.digest, len(known), sum(not one.runs for one in known.values()), overlaps)


def _texts(value: Any) -> Iterator[str]:
    """Yield every text inside a row, in its order; numbers and the roles of messages are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ROLE_KEYS or not isinstance(inner, str):
                yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
