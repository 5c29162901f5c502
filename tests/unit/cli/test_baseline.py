"""`luthier baseline` trains what it says once, tells what came of it, and never mixes two comparisons."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.train.settings import RunSettings

pytestmark = pytest.mark.slow


def test_pairs_and_full_are_trained_once_and_compared(
    luthier: Callable[..., Any], tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings = RunSettings(
        model=str(tiny_folder), out="unused", dtype="float32", data={"path": str(rows_file), "eval_path": str(rows_file)}
    )
    (tmp_path / "run.toml").write_text(settings.to_toml())
    words = (
        "baseline",
        "run.toml",
        "-o",
        "cmp",
        "--rank",
        2,
        "--max-steps",
        2,
        "--match",
        3,
        "--json",
        "-s",
        "train.batch_rows=4",
    )
    said = luthier(*words)
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert list(found) == ["r2", "full"]
    assert found["r2"]["parameters"] < found["full"]["parameters"]
    for name in found:
        summary = json.loads((tmp_path / "cmp" / name / "summary.json").read_text())
        assert found[name]["eval_loss"] == summary["best_eval_loss"]
        assert len(json.loads((tmp_path / "cmp" / name / "answers-3.json").read_text())["samples"]) == 3
    assert (tmp_path / "cmp" / "baseline.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "cmp" / "baseline.json").read_text()) == found

    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cmp").glob("*/**/*.*")}
    assert json.loads(luthier(*words).out) == found
    assert {path: path.stat().st_mtime_ns for path in written} == written

    other = luthier("baseline", "run.toml", "-o", "cmp", "--rank", 2, "--max-steps", 3, "--json")
    assert other.status == 2
    assert "other settings" in json.loads(other.out)["error"]["message"]


def test_exact_match_needs_rows_to_answer(
    luthier: Callable[..., Any], tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings = RunSettings(model=str(tiny_folder), out="unused", data={"path": str(rows_file)})
    (tmp_path / "run.toml").write_text(settings.to_toml())
    said = luthier("baseline", "run.toml", "-o", "cmp", "--match", 3)
    assert said.status == 2
    assert "data.eval_path" in said.err
    assert not (tmp_path / "cmp").exists()


def test_a_base_in_4_bits_is_refused_before_anything_is_trained(
    luthier: Callable[..., Any], tiny_folder: Path, rows_file: Path, tmp_path: Path
) -> None:
    settings = RunSettings(model=str(tiny_folder), out="unused", quantize="nf4", data={"path": str(rows_file)})
    (tmp_path / "run.toml").write_text(settings.to_toml())
    said = luthier("baseline", "run.toml", "-o", "cmp", "--json")
    assert said.status == 2
    assert "-s quantize=none" in json.loads(said.out)["error"]["message"]
    assert not (tmp_path / "cmp").exists()
