"""`luthier sweep` and `luthier learning-curve` from the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.train.settings import read_settings

QUICK = ("-s", "dtype=float32", "-s", "train.batch_rows=4", "-s", "data.max_length=128", "-s", "lora.r=4")

pytestmark = pytest.mark.slow


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    from tests.tiny_run import write_rows

    return write_rows(tmp_path / "rows.jsonl", 24)


def test_a_search_ends_with_settings_to_train_with(
    luthier: Callable[..., Any], tiny_folder: Path, many_rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(
        f'model = "{tiny_folder}"\n[data]\npath = "{many_rows}"\n[train]\nlearning_rate = 0.01\n'
        "[sweep]\nranks = [2]\ntrials = 9\nsteps = 5\n"
    )
    words = ("sweep", "-c", "run.toml", "-o", "s", *QUICK, "--json")
    said = luthier(*words, "--trials", 2, "--steps", 3, "--target", "q_proj,v_proj")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert [row["r"] for row in found["trials"]] == [2, 2]
    assert {tuple(row["target_modules"]) for row in found["trials"]} == {("q_proj", "v_proj")}
    assert found["steps"] == 3
    settings = read_settings(tmp_path / "s/recommended.toml", {"out": "x"})
    if found["changes"]:
        assert settings.lora.target_modules == ["q_proj", "v_proj"]
    assert "trial 1 (r=2" in said.err and "of 2 trials" in said.err

    again = luthier("sweep", "--resume", "s", "--json")
    assert again.status == 0 and json.loads(again.out) == found

    trained = luthier("train", "-c", "s/recommended.toml", "-o", "t", "--max-steps", 1, "--json")
    assert trained.status == 0, trained.err

    taken = luthier(*words)
    assert taken.status == 1 and "--resume" in json.loads(taken.out)["error"]["message"]


def test_flags_that_make_no_sense_are_refused(luthier: Callable[..., Any], tiny_folder: Path, many_rows: Path) -> None:
    base = ("sweep", "-m", tiny_folder, "-d", many_rows)
    assert "both or neither" in luthier(*base, "--lr-low", "1e-4").err
    assert "--resume takes its settings" in luthier("sweep", "--resume", "s", "--trials", 3).err
    said = luthier(*base, "--pruner", "best")
    assert said.status == 2 and "pruner" in said.err


def test_a_learning_curve_says_whether_more_rows_would_help(
    luthier: Callable[..., Any], tiny_folder: Path, many_rows: Path, tmp_path: Path
) -> None:
    words = ("learning-curve", "-m", tiny_folder, "-d", many_rows, "-o", "c", *QUICK, "--json")
    said = luthier(*words, "--share", 0.25, "--share", 0.5, "--share", 1)
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert [point["rows"] for point in found["points"]] == [5, 5, 10, 10, 20, 20]
    assert found["verdict"] in said.err
    assert (tmp_path / "c/curve.png").exists()
