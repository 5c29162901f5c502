"""Runs carried out by several processes: the same numbers as by one, whoever is stopped or killed, and whoever goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_run import ENVIRONMENT

from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.records import StepRecord
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

TOLERANCE = 1e-5
TRAIN = {"epochs": 2, "batch_rows": 2, "learning_rate": 0.01, "eval_every": 2, "save_every": 1, "compile": "off"}
"""Ten rows to train on make five micro-batches: the third step of an epoch has one, and leaves the second process without."""
LONG = TRAIN | {"epochs": 99, "max_steps": 60, "eval_every": 20}


@pytest.fixture(scope="module")
def settings_of(tiny_folder: Path, rows_file: Path) -> Callable[..., RunSettings]:
    def make(out: Path, train: dict[str, Any] = TRAIN, **changed: Any) -> RunSettings:
        data = {"path": str(rows_file), "eval_fraction": 0.2}
        return RunSettings(
            model=str(tiny_folder),
            out=str(out),
            dtype="float32",
            data=data,
            lora={"r": 4},
            train=train | changed,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture(scope="module")
def by_one(settings_of: Callable[..., RunSettings], tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Return a function that gives the folder of the run by one process with twice the accumulation."""
    home, done = tmp_path_factory.mktemp("one"), {}

    def run(train_settings: dict[str, Any]) -> Path:
        name = f"steps-{train_settings.get('max_steps')}"
        if name not in done:
            train(settings_of(home / name, train_settings, accumulate=2))
            done[name] = home / name
        return done[name]

    return run


def begin(settings: RunSettings, *words: object, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """Start `luthier train` with these settings, from a file of settings beside the folder of the run."""
    config = Path(settings.out).with_suffix(".toml")
    config.write_text(settings.to_toml())
    return start("train", "--config", config, *words, launcher=launcher)


def start(*words: object, launcher: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    asked = [sys.executable, *launcher, "-m", "luthier", *map(str, words)]
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(asked, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Wait for a command and return its status and what it wrote; nothing that it started is left."""
    own = psutil.Process(process.pid)
    started = own.children(recursive=True) if process.poll() is None else []
    out, err = process.communicate(timeout=200)
    assert not [child for child in started if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return process.returncode, out, err


def process_of_rank(launcher: "subprocess.Popen[str]", rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children(recursive=True)
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def wait_for_steps(process: "subprocess.Popen[str]", run: Path, steps: int) -> None:
    while process.poll() is None and not (run / "run.jsonl").exists():
        time.sleep(0.01)
    while process.poll() is None and (run / "run.jsonl").read_text().count("\n") < steps:
        time.sleep(0.01)


def assert_same_run(run: Path, reference: Path) -> None:
    """The two logs tell the same numbers, and the two adapters have the same weights, to a hundred-thousandth."""
    logs = [RunFolder(folder).read_log() for folder in (run, reference)]
    assert [record["step"] for record in logs[0]] == [record["step"] for record in logs[1]]
    for found, wanted in zip(*logs, strict=True):
        assert found.keys() == wanted.keys()
        for key in wanted.keys() - {"seconds"}:
            assert found[key] == pytest.approx(wanted[key], rel=TOLERANCE), f"{key} of step {wanted['step']}"
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, reference)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, wanted_tensor in adapters[1].items():
        torch.testing.assert_close(adapters[0][name], wanted_tensor, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--shard", "fsdp2")], ids=["replicated", "fsdp2"])
def test_two_processes_train_as_one_with_twice_the_accumulation(
    words: tuple[str, ...], settings_of: Callable[..., RunSettings], by_one: Callable[..., Path], tmp_path: Path
) -> None:
    status, out, err = ended(begin(settings_of(tmp_path / "run"), "--nproc", 2, "--json", *words))
    assert status == 0, err
    summary = json.loads(out)  # one document: the other process is silent
    assert (summary["steps"], summary["processes"]) == (6, 2)
    assert err.count("before the first step") == 1
    assert_same_run(tmp_path / "run", by_one(TRAIN))


@pytest.mark.slow
def test_torchrun_starts_it_too(settings_of: Callable[..., RunSettings], by_one: Callable[..., Path], tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    status, _, err = ended(begin(settings_of(tmp_path / "run"), launcher=torchrun))
    assert status == 0, err
    assert_same_run(tmp_path / "run", by_one(TRAIN))


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "processes"), [(1, 2), (0, 1)])
def test_a_killed_process_ends_the_run_and_it_resumes(
    rank: int, processes: int, settings_of: Callable[..., RunSettings], by_one: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = begin(settings_of(run, LONG), "--nproc", 2)
    wait_for_steps(process, run, 5)
    process_of_rank(process, rank).send_signal(signal.SIGKILL)
    status, _, err = ended(process)
    assert status == 1, err
    assert err.count("Error: ") == 1, err
    assert f"process {rank} of 2 was ended by SIGKILL" in err
    assert f"luthier train --resume {run}" in err
    assert "Traceback" not in err
    found = RunFolder(run).load_checkpoint()
    assert found is not None and 0 < found[0].step < LONG["max_steps"]

    status, _, err = ended(start("train", "--resume", run, "--nproc", processes))
    assert status == 0, err
    assert_same_run(run, by_one(LONG))


@pytest.mark.slow
@pytest.mark.parametrize("to", ["launcher", "process 1"])
def test_a_signal_to_any_stops_all_at_a_checkpoint(
    to: str, settings_of: Callable[..., RunSettings], by_one: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ("--shard", "fsdp2") if to == "launcher" else ()
    process = begin(settings_of(run, LONG), "--nproc", 2, "--json", *words)
    wait_for_steps(process, run, 3)
    if to == "launcher":
        process.send_signal(signal.SIGINT)
    else:
        process_of_rank(process, 1).send_signal(signal.SIGTERM)
    status, out, err = ended(process)
    assert status == 130, err
    assert json.loads(out)["ended"] == "interrupted"
    assert f"Continue with: luthier train --resume {run}" in err
    assert "Traceback" not in err
    found = RunFolder(run).load_checkpoint()
    assert found is not None and found[0].step == json.loads(out)["steps"] < LONG["max_steps"]

    assert resume(run).summary["ended"] == "finished"  # by one process
    assert_same_run(run, by_one(LONG))


@pytest.mark.slow
def test_what_one_process_began_two_can_finish(
    settings_of: Callable[..., RunSettings], by_one: Callable[..., Path], tmp_path: Path
) -> None:
    settings = settings_of(tmp_path / "run", LONG, accumulate=2)
    trainer = Trainer(prepare(settings), RunFolder.create(settings))

    class StopAtSeven:
        def on_step(self, record: StepRecord) -> None:
            trainer.stop_requested = record.step == 7

        def on_eval(self, record: object) -> None:
            pass

    trainer.observer = StopAtSeven()
    assert trainer.run() == "interrupted"
    status, out, err = ended(start("train", "--resume", tmp_path / "run", "--nproc", 2))
    assert status == 0, err
    assert out.count("went on with 1 process so far and goes on with 2") == 1
    assert_same_run(tmp_path / "run", by_one(LONG))


@pytest.mark.slow
def test_an_error_is_told_once(settings_of: Callable[..., RunSettings], tmp_path: Path) -> None:
    run = tmp_path / "run"
    too_fast = settings_of(run, LONG, learning_rate=1e30, warmup=0.0, schedule="constant")
    status, out, err = ended(begin(too_fast, "--nproc", 2, "--json"))
    assert status == 1
    assert json.loads(out)["error"]["kind"] == "DivergedError"
    assert err.count("Error: ") == 1, err
    assert "is nan" in err or "is inf" in err
    assert f"To go on from the last checkpoint: luthier train --resume {run}" in err
    assert "Traceback" not in err
