"""A search that is killed with SIGKILL, in a trial, between trials and in the last run, ends as one that was not."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import ENVIRONMENT, command, run_luthier, save_tiny_model, write_rows

pytestmark = pytest.mark.slow

PATIENCE_S = 300.0
FEW = ("--trials", 6, "--rank", 2, "--rank", 4, "--lr-low", "1e-4", "--lr-high", "0.3")
LOOP = ("-s", "train.batch_rows=6", "-s", "train.epochs=2", "-s", "dtype=float32", "-s", "train.eval_every=2", "-s", "lora.r=4")


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def killed(words: list[object], home: Path, when: Callable[[], bool]) -> None:
    """Start `luthier` with these words, and kill it as soon as `when` holds; it must not have ended by itself."""
    with subprocess.Popen(
        command(*words), cwd=home, env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL
    ) as process:
        begin = time.monotonic()
        while not when():
            assert process.poll() is None, "the search ended before it could be killed"
            assert time.monotonic() - begin < PATIENCE_S
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that two equal searches have in common; only clocks and folders' names may differ."""
    result = json.loads((folder / "sweep.json").read_text())
    trials = [{key: value for key, value in row.items() if key != "seconds"} for row in result["trials"]]
    adapters = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("adapter/adapter_model.safetensors")}
    default = {key: value for key, value in result["default"].items() if key != "seconds"}
    common = {key: result[key] for key in ("changes", "reasons", "test", "rank", "steps")}
    rows = {path.name: path.read_text() for path in (folder / "rows").iterdir()}
    best = result["best"]["trial"]
    recommended = (folder / "recommended.toml").read_text()
    told = {"trials": trials, "default": default, "best": best, "rows": rows, "recommended": recommended}
    return common | told | {"adapters": adapters}


def test_a_search_killed_and_resumed_ends_with_the_same_best_trial(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3)
    write_rows(tmp_path / "rows.jsonl", 50)
    words = ["sweep", "-m", model, "-d", "rows.jsonl", *FEW, *LOOP]
    said = run_luthier(*words, "-o", "whole", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["best"]["loss"] is not None

    cut = tmp_path / "cut"
    trial = [cut / "trials" / f"trial-{number:03d}" for number in range(6)]
    killed([*words, "-o", "cut"], tmp_path, lambda: lines(trial[1] / "run.jsonl") >= 4)
    killed(["sweep", "--resume", "cut"], tmp_path, lambda: lines(trial[2] / "run.jsonl") >= 7)
    killed(["sweep", "--resume", "cut"], tmp_path, (trial[3] / "trial.json").exists)
    killed(["sweep", "--resume", "cut"], tmp_path, (trial[5] / "config.toml").exists)
    killed(["sweep", "--resume", "cut"], tmp_path, lambda: lines(cut / "default" / "run.jsonl") >= 3)
    assert not (cut / "sweep.json").exists()
    said = run_luthier("sweep", "--resume", "cut", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert outcome(cut) == outcome(tmp_path / "whole")
    assert len(outcome(cut)["trials"]) == 6
