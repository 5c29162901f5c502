"""Rows told apart before anything is trained, and written as files, so that every run over them is a run like any other."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.core.errors import ConfigError
from luthier.data.batches import split_rows
from luthier.data.read import read_rows
from luthier.train.settings import DataSettings, RunSettings, TrainSettings

FEWEST = 3
"""Rows that a paired comparison needs at least."""


def split(data: DataSettings, folder: Path, *, eval_fraction: float, test: tuple[str | None, float] | None, seed: int) -> None:
    """Write train.jsonl, held-out.jsonl and, where `test` (path or else share) asks for them, test.jsonl into `folder`.

    The test rows are taken first, so they are the same whatever is held out of the rest.
    Raises: DataError for rows that cannot be read, ConfigError where a side would have fewer than three rows.
    """
    rows = read_rows(data.path, limit=data.limit).rows
    sides: dict[str, list[dict[str, Any]]] = {}
    if test is not None:
        path, share = test
        if path is not None:
            sides["test"] = read_rows(path).rows
        else:
            kept, taken = split_rows(len(rows), share, seed)
            sides["test"], rows = [rows[index] for index in taken], [rows[index] for index in kept]
    if data.eval_path is not None:
        sides["held-out"] = read_rows(data.eval_path).rows
    else:
        kept, taken = split_rows(len(rows), eval_fraction, seed + 1)
        sides["held-out"], rows = [rows[index] for index in taken], [rows[index] for index in kept]
    sides["train"] = rows
    if few := [f"{name}: {len(side)}" for name, side in sides.items() if len(side) < FEWEST]:
        raise ConfigError(f"each side of the split needs {FEWEST} rows at least ({', '.join(few)}); give more rows")
    for name, side in sides.items():
        write_atomic(folder / f"{name}.jsonl", lines_of(side))


def write_shuffled(rows: Sequence[dict[str, Any]], path: Path, seed: int) -> None:
    """Write rows in an order of chance: the first so many of them are a sample, and larger samples hold the smaller ones."""
    order = list(rows)
    random.Random(f"luthier shares, seed {seed}").shuffle(order)
    write_atomic(path, lines_of(order))


def lines_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def on_files(
    settings: RunSettings, train: Path, held_out: Path, out: Path, *, loop: TrainSettings, limit: int | None = None
) -> RunSettings:
    """Return the settings of a run over written rows, with `loop` in the place of its [train]; nobody else looks on."""
    data = settings.data.changed(path=str(train), eval_path=str(held_out), limit=limit)
    alone = {"report": False, "anchors": 0, "track": (), "track_project": None}
    return settings.changed(data=data, out=str(out), train=loop.changed(**alone))
