"""Rows of preferences that a tiny model can learn: the better answer is the question's first word in capitals."""

import json
from pathlib import Path
from typing import Any

from tests.tiny_run import WORDS


def pairs(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return pairs of odd and unlike lengths."""
    found = []
    for index in range(start, start + count):
        asked = [WORDS[(index * 7 + turn) % len(WORDS)] for turn in range(1 + index % 4)]
        right, wrong = asked[0].upper(), WORDS[(index * 5 + 3) % len(WORDS)] * (1 + index % 2)
        found.append({"prompt": " ".join(asked), "chosen": right, "rejected": wrong})
    return found


def marked(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return answers of which every other one is good."""
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if index % 2 else "chosen"], "label": index % 2 == 0}
        for index, pair in enumerate(pairs(count, start=start))
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
