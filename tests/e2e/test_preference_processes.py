"""Preferences learnt by two processes: the numbers of one process that accumulates twice as much."""

from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_processes import TOLERANCE, begin, ended
from tests.preference_rows import marked, pairs, write

from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

TRAIN = {"epochs": 2, "batch_rows": 2, "learning_rate": 0.01, "eval_every": 3, "compile": "off"}


def settings_in(out: Path, model: Path, kind: str, **changed: Any) -> RunSettings:
    rows = write(out.parent / f"{kind}.jsonl", marked(10) if kind == "kto" else pairs(10))
    return RunSettings(
        model=str(model),
        out=str(out),
        dtype="float32",
        objective={"kind": kind},
        data={"path": str(rows), "eval_fraction": 0.2},
        lora={"r": 4},
        train=TRAIN | changed,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shard"), [("dpo", "none"), ("dpo", "fsdp2"), ("kto", "none"), ("reward", "fsdp2")])
def test_two_processes_give_the_numbers_of_one(kind: str, shard: str, tiny_folder: Path, tmp_path: Path) -> None:
    train(settings_in(tmp_path / "one", tiny_folder, kind, accumulate=2))
    status, _, said = ended(begin(settings_in(tmp_path / "two", tiny_folder, kind, shard=shard), "--nproc", 2))
    assert status == 0, said[-3000:]
    wanted, found = (RunFolder(tmp_path / name).read_log() for name in ("one", "two"))
    assert len(found) == len(wanted) > 4
    for one, two in zip(wanted, found, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"seconds"}:
            assert two[name] == pytest.approx(one[name], rel=TOLERANCE, abs=TOLERANCE), name
