"""Runs that are killed or stopped, as processes: they are resumed, and end as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.tiny_run import ENVIRONMENT, command

from luthier.train.run import resume
from luthier.train.runfolder import RunFolder

SEEDS = 4
COMMON = ("ended", "steps", "planned_steps", "tokens", "labelled_tokens", "loss", "best_eval_loss", "best_step", "adapter_bytes")
LIVELY = ("lora.lora_dropout=0.2", "train.accumulate=2", "train.eval_every=2", "train.save_every=1", "data.eval_fraction=0.2")


def outcome(run: Path) -> dict[str, object]:
    """Return what two equal runs have in common; only clocks differ, and the name of the folder."""
    log = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    return {
        "adapter": {file.name: file.read_bytes() for file in (run / "adapter").iterdir()},
        "log": [{key: value for key, value in record.items() if key != "seconds"} for record in log],
        "optimiser": {path.parent.name: path.read_bytes() for path in run.glob("checkpoints/*/optimizer.safetensors")},
        "summary": {
            key: summary[key] for key in ("ended", "steps", "tokens", "labelled_tokens", "loss", "best_eval_loss", "best_step")
        },
    }


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bits(tiny_folder: Path, rows_file: Path, tmp_path: Path, root: Path) -> None:
    words = ["-m", tiny_folder, "-d", rows_file, "--r", "4", "--epochs", "3", "--batch-rows", "2", "--learning-rate", "0.03"]
    for setting in LIVELY:
        words += ["--set", setting]
    done = subprocess.run(
        [sys.executable, root / "tests" / "e2e" / "killing.py", tmp_path, str(SEEDS), "--", *words],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    kills = [kill for life in lives for kill in life]
    assert len(kills) >= SEEDS
    assert any(kill["left"] for kill in kills), "no kill hit a checkpoint being written"
    whole = outcome(tmp_path / "whole")
    assert whole["summary"]["steps"] == 9  # type: ignore[index]
    for seed in range(SEEDS):
        run = tmp_path / f"seed-{seed}"
        assert outcome(run) == whole
        assert not list(run.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_a_checkpoint(number: signal.Signals, tiny_folder: Path, rows_file: Path, tmp_path: Path) -> None:
    run, environment = tmp_path / "run", os.environ | ENVIRONMENT
    words = ("train", "-m", tiny_folder, "-d", rows_file, "--r", "4", "--max-steps", "90", "--epochs", "99", "--batch-rows", "4")
    asked = command(*words, "--out", run, "--json")
    process = subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (run / "run.jsonl").exists():
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    summary = json.loads(out)
    assert process.returncode == 130, err
    assert summary["ended"] == "interrupted"
    assert summary["next"] == [f"luthier train --resume {run}"]
    assert f"Continue with: luthier train --resume {run}" in err
    assert "Traceback" not in err
    found = RunFolder(run).load_checkpoint()
    assert found is not None
    assert 0 < found[0].step == summary["steps"] < 90
    assert not (run / "summary.json").exists()

    resumed = resume(run).summary
    assert (resumed["ended"], resumed["steps"]) == ("finished", 90)
    assert [record["step"] for record in RunFolder(run).read_log() if "loss" in record] == list(range(1, 91))
