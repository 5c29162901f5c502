"""A tiny model and rows on disk, for whole runs of the command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import save_tiny_model, write_rows


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Llama model with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("base") / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=1)


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 13 rows to train on."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 13)
