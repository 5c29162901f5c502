"""`luthier eval --suite general`: the shipped suites reach a model by their name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.evaluate.shipped import SHIPPED, shipped_suite


def test_general_puts_every_shipped_suite_to_base_and_adapter(luthier: Callable[..., Any], trained: Path) -> None:
    said = luthier("eval", trained, "--suite", "general", "--limit", "2", "--no-remember", "--json")
    assert said.status == 0, said.err
    found = {each["suite"]: each for each in json.loads(said.out)["suites"]}
    assert tuple(found) == SHIPPED
    for name, each in found.items():
        assert each["digest"] == shipped_suite(name).limited(2).digest
        assert each["base"] > 5 if name == "neutral" else 0 <= each["base"] <= 1
