"""A tiny model on disk, a few rows, and settings of runs that take a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import save_tiny_model, write_rows

from luthier.train.settings import RunSettings


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=1)


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with rows.jsonl and held-out.jsonl. Tests that change rows write their own."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.jsonl", 13)
    write_rows(folder / "held-out.jsonl", 5, start=50)
    return folder


@pytest.fixture(scope="session")
def settings_in(tiny_folder: Path, rows_folder: Path) -> Callable[..., RunSettings]:
    """Return a factory of settings of small runs; keywords are the sections."""

    def make(
        out: Path, *, data: dict | None = None, lora: dict | None = None, train: dict | None = None, **top: Any
    ) -> RunSettings:
        values: dict[str, Any] = {
            "model": str(tiny_folder),
            "out": str(out),
            "dtype": "float32",
            "data": {"path": str(rows_folder / "rows.jsonl"), "eval_path": str(rows_folder / "held-out.jsonl")} | (data or {}),
            "lora": {"r": 3} | (lora or {}),
            "train": {"batch_rows": 3, "epochs": 2, "learning_rate": 1e-2} | (train or {}),
        }
        return RunSettings(**(values | top))

    return make


@pytest.fixture
def run_settings(settings_in: Callable[..., RunSettings], tmp_path: Path) -> Callable[..., RunSettings]:
    """Return a factory of settings of small runs in `tmp_path`; `out` is the run's name there."""
    return lambda *, out="run", **sections: settings_in(tmp_path / out, **sections)
