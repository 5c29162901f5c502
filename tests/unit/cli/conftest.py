"""The command line in this process, and one small trained run to point it at."""

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import save_tiny_model, write_rows

from luthier.train.run import train
from luthier.train.settings import RunSettings


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit status."""

    status: int
    out: str
    err: str


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Callable[..., Said]]:
    """Return a function that runs `luthier` with the words given, in the folder `tmp_path`, as the installed command does."""
    from luthier.cli.app import main

    # main sets up logging for a whole process; other tests in this one want theirs back.
    log = logging.getLogger("luthier")
    before = (list(log.handlers), log.level, log.propagate)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # where a line is broken would depend on how long the name of this folder is

    def run(*words: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["luthier", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Said(end.value.code or 0, out, err)  # type: ignore[arg-type]

    yield run
    log.handlers, level, log.propagate = before
    log.setLevel(level)


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama model with its tokenizer."""
    return save_tiny_model(
        tmp_path_factory.mktemp("base") / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3
    )


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 11 rows to train on."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 11)


@pytest.fixture(scope="session")
def held_out_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 5 held-out rows, three of them among those trained on, so that some answers are right."""
    return write_rows(tmp_path_factory.mktemp("rows") / "held-out.jsonl", 5, start=8)


@pytest.fixture(scope="session")
def trained(tiny_folder: Path, rows_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run that has learned some of its rows."""
    values: dict[str, Any] = {
        "model": str(tiny_folder),
        "out": str(tmp_path_factory.mktemp("runs") / "run"),
        "dtype": "float32",
        "data": {"path": str(rows_file), "eval_path": str(held_out_file)},
        "lora": {"r": 16},
        "train": {"epochs": 150, "learning_rate": 0.02, "batch_rows": 11, "eval_every": 150},
    }
    return Path(train(RunSettings(**values)).summary["run"])
