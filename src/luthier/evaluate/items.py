"""From a suite's rows to the items that are put to a model: the templates are rendered here, and every row is checked.

Never sees a tokenizer or a model; never scores.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.faults import RowFaults
from luthier.data.templates import RowTemplate
from luthier.evaluate.checks import Check, read_checks
from luthier.evaluate.definitions import ChoiceSuite, GenerateSuite, PairsSuite, RollingSuite, SuiteDefinition
from luthier.evaluate.metrics import is_json_container, number_in


@dataclass(frozen=True)
class Item:
    """What all items have: a name that is unique in the suite, what they were drawn with, and the parts they are counted in."""

    id: str
    cluster: str
    slices: tuple[str, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """Every text of the item, as a comparison with training rows needs them."""
        raise NotImplementedError


@dataclass(frozen=True)
class ChoiceItem(Item):
    """A prompt, its options, and the place of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt, *self.options)


@dataclass(frozen=True)
class PairItem(Item):
    """Two texts, of which the first is the better one."""

    good: str
    bad: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.good, self.bad)


@dataclass(frozen=True)
class GenerateItem(Item):
    """A prompt, and what an answer to it is held against."""

    prompt: str
    references: tuple[str, ...]
    checks: tuple[Check, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.prompt, *self.references)


@dataclass(frozen=True)
class RollingItem(Item):
    """A document."""

    text: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)


def make_items(definition: SuiteDefinition, rows: Sequence[Mapping[str, Any]]) -> tuple[Item, ...]:
    """Return the items of the rows that `where` lets through, limited as the definition says, in the order of the rows.

    Raises: DataError listing what is wrong with the rows, names that come twice among it; or that no row is left.
    """
    maker = _Maker(definition)
    items: list[Item] = []
    faults, seen = RowFaults(), set[str]()
    for index, row in enumerate(rows):
        try:
            if not maker.wants(row):
                continue
            item = maker.make(index, row)
            if item.id in seen:
                raise ValueError(f"has the id {item.id!r}, which another row has too")
        except ValueError as fault:
            faults.add(f"row {index}", str(fault))
            continue
        seen.add(item.id)
        items.append(item)
    faults.raise_if_any(f"rows of the suite '{definition.name}' cannot be used, counted from 0")
    if not items:
        faults.add("where", f"lets none of the {len(rows)} rows through")
    faults.raise_if_any(f"the suite '{definition.name}' has no items")
    return tuple(items[place] for place in _chosen(len(items), definition))


def _chosen(n: int, definition: SuiteDefinition) -> Sequence[int]:
    if definition.limit is None or definition.limit >= n:
        return range(n)
    if definition.seed is None:
        return range(definition.limit)
    return sorted(random.Random(f"luthier suite items, seed {definition.seed}").sample(range(n), definition.limit))


class _Maker:
    """The templates of one definition, compiled once."""

    def __init__(self, definition: SuiteDefinition) -> None:
        self._definition = definition
        self._templates: dict[str, RowTemplate] = {}
        self._build: Any = {"choice": self._choice, "pairs": self._pair, "generate": self._generate, "rolling": self._rolling}[
            definition.type
        ]

    def wants(self, row: Mapping[str, Any]) -> bool:
        said = "True" if self._definition.where is None else self._render("where", self._definition.where, row)
        if said not in ("True", "False"):
            raise ValueError(f"gets {said!r} from 'where', which must say True or False")
        return said == "True"

    def make(self, index: int, row: Mapping[str, Any]) -> Item:
        asked = self._definition
        name = str(index) if asked.id is None else self._text("id", asked.id, row)
        cluster = name if asked.cluster is None else self._text("cluster", asked.cluster, row)
        slices = [self._render(f"slices {place}", source, row).strip() for place, source in enumerate(asked.slices)]
        made: Item = self._build(asked, row, (name, cluster, tuple(part for part in slices if part)))
        return made

    def _choice(self, asked: ChoiceSuite, row: Mapping[str, Any], common: tuple[str, str, tuple[str, ...]]) -> Item:
        options = self._list("options", asked.options, row) if isinstance(asked.options, str) else list(asked.options)
        if len(options) < 2 or not all(isinstance(option, str) and option for option in options):
            raise ValueError(f"has the options {options!r}; needed are two or more texts, none of them empty")
        said = self._render("answer", asked.answer, row).strip()
        if not (said.isdecimal() and int(said) < len(options)):
            raise ValueError(f"has the answer {said!r}; needed is the place of one of {len(options)} options, counted from 0")
        prompt = self._text("prompt", asked.prompt, row) if asked.prompt else ""
        return ChoiceItem(*common, prompt, tuple(options), int(said))

    def _pair(self, asked: PairsSuite, row: Mapping[str, Any], common: tuple[str, str, tuple[str, ...]]) -> Item:
        good, bad = self._text("good", asked.good, row), self._text("bad", asked.bad, row)
        if good == bad:
            raise ValueError(f"has the same text as good and as bad, {good[:60]!r}")
        return PairItem(*common, good, bad)

    def _generate(self, asked: GenerateSuite, row: Mapping[str, Any], common: tuple[str, str, tuple[str, ...]]) -> Item:
        checks = self._list("checks", asked.checks, row) if isinstance(asked.checks, str) else asked.checks or ()
        references: list[Any] = []
        if asked.references is not None:
            references = self._list("references", asked.references, row)
        elif asked.reference is not None:
            references = [self._text("reference", asked.reference, row)]
        if not all(isinstance(reference, str) and reference.strip() for reference in references) or (
            asked.references is not None and not references
        ):
            raise ValueError(f"has the references {references!r}; needed are one or more texts, none of them empty")
        if asked.score == "number" and (words := [each for each in references if number_in(each) is None]):
            raise ValueError(f"has the reference {words[0]!r}, in which there is no number")
        if asked.score == "json-fields" and not is_json_container(references[0]):
            raise ValueError(f"has the reference {references[0][:60]!r}, which is no JSON object or array")
        return GenerateItem(*common, self._text("prompt", asked.prompt, row), tuple(references), read_checks(checks))

    def _rolling(self, asked: RollingSuite, row: Mapping[str, Any], common: tuple[str, str, tuple[str, ...]]) -> Item:
        return RollingItem(*common, self._text("text", asked.text, row))

    def _list(self, name: str, source: str, row: Mapping[str, Any]) -> list[Any]:
        return _json_list(name, self._render(name, source, row))

    def _text(self, name: str, source: str, row: Mapping[str, Any]) -> str:
        said = self._render(name, source, row)
        if not said.strip():
            raise ValueError(f"gets an empty text from '{name}'")
        return said

    def _render(self, name: str, source: str, row: Mapping[str, Any]) -> str:
        if name not in self._templates:
            self._templates[name] = RowTemplate(f"'{name}'", source)
        return self._templates[name].render(row)


def _json_list(name: str, said: str) -> list[Any]:
    try:
        found = json.loads(said)
    except ValueError as fault:
        raise ValueError(f"gets no JSON from '{name}' ({fault}): {said[:60]!r}") from None
    if not isinstance(found, list):
        raise ValueError(f"gets {type(found).__name__} from '{name}'; needed is a JSON list: {said[:60]!r}")
    return found
