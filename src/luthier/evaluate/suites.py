"""A suite: its definition with its rows, and the digest that says which scores can be paired. No torch, no tokenizer, no model.

A suite's `digest` names the definition, the bytes of its data and the harness that scores it: equal digests mean that scores can
be paired.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.data.read import read_rows
from luthier.evaluate.definitions import SuiteDefinition, read_definition
from luthier.evaluate.items import Item, make_items

HARNESS = "luthier-1"
"""Changes whenever the same suite on the same model would give other scores."""


@dataclass(frozen=True)
class Suite:
    """A definition with its rows. `data_digest` is the sha256 of the bytes the rows came from; `notes` tell what was left out."""

    definition: SuiteDefinition
    rows: Sequence[Mapping[str, Any]]
    data_digest: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.definition.name

    @cached_property
    def digest(self) -> str:
        """sha256 over the definition, the data and the harness; where the data lies and what people are told do not count."""
        said = self.definition.model_dump(mode="json", exclude={"data", "description"})
        known = {"harness": HARNESS, "data": self.data_digest, "definition": said}
        return hashlib.sha256(json.dumps(known, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """What is put to the model, rendered. Raises: DataError listing the rows that cannot be used."""
        return make_items(self.definition, self.rows)

    def limited(self, limit: int) -> "Suite":
        """Return the same suite with so many items at most: another suite, with another digest."""
        if self.definition.limit is not None and self.definition.limit <= limit:
            return self
        return Suite(self.definition.changed(limit=limit), self.rows, self.data_digest, self.notes)


def load_suite(path: str | Path) -> Suite:
    """Return the suite that the TOML file `path` describes, with its rows read and its items checked.

    Raises: ConfigError for the file, all faults at once; DataError for its rows, likewise.
    """
    path = Path(path)
    definition = read_definition(path)
    data = path.parent / definition.data
    if not data.is_file():
        raise DataError(f"the data of suite {path} is not there: {data} is no file")
    suite = Suite(definition, read_rows(data).rows, file_digest(data))
    _ = suite.items  # what is wrong with the rows is told now, not after the model was loaded
    return suite


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
