"""`luthier contamination`: what it names is what was planted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from luthier.evaluate.shipped import FOLDER


def test_planted_items_are_named_with_their_rows(luthier: Callable[..., Any], tmp_path: Path) -> None:
    facts = [json.loads(line) for line in (FOLDER / "facts.jsonl").read_text().splitlines()]
    planted = [
        {"prompt": f"{facts[n]['question'].upper()}...", "completion": facts[n]["options"][facts[n]["answer"]]}
        for n in (40, 7, 40)
    ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [{"prompt": "Hi!", "completion": "Ho!"}, *planted])
    )
    told = json.loads(luthier("contamination", "--train", "rows.jsonl", "--suite", "facts", "--suite", "neutral", "--json").out)
    assert told["rows"] == 4
    by_suite = {one["suite"]: one for one in told["suites"]}
    assert {one["item"]: one["rows"] for one in by_suite["facts"]["overlaps"]} == {facts[7]["id"]: [2], facts[40]["id"]: [1, 3]}
    assert by_suite["facts"]["share"] == 2 / len(facts)
    assert by_suite["neutral"]["overlaps"] == []
    words = " ".join(luthier("contamination", "--train", "rows.jsonl", "--suite", "facts").out.split())
    assert f"facts: {facts[40]['id']} (100% of it) in row 1, 3" in words
    assert f"│ facts │ {len(facts)} │ {len(facts)} │ 2 │ 0.6% │" in words


def test_an_unknown_suite_is_answered_with_those_there_are(luthier: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi!", "completion": "Ho!"}\n')
    said = luthier("contamination", "--train", "rows.jsonl", "--suite", "genral")
    assert said.status == 2
    assert "Did you mean 'general'?" in said.err
