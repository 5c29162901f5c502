"""Runs below a folder as they are found, whatever state they are in; and laid side by side."""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.unit.train.test_resume import crashed_run

from luthier.core.errors import CheckpointError, ConfigError
from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.runs import chosen, curves, differing, everything, final_figures, find_runs, labelled, opened, read_run
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]


@pytest.fixture(scope="module")
def shelf(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two finished runs, one that crashed, and things that are no runs. Not to be changed."""
    home = tmp_path_factory.mktemp("shelf")
    train(settings_in(home / "plain", train={"max_steps": 4, "eval_every": 2}))
    train(settings_in(home / "deeper" / "wide", lora={"r": 5, "use_rslora": True}, train={"max_steps": 3, "anchors": 1}))
    crashed_run(settings_in(home / "crashed", train={"save_every": 2}), 3)
    (home / "other" / "config").mkdir(parents=True)
    (home / "other" / "config.toml").write_text('[alias]\nb = "build"\n')
    (home / ".hidden").mkdir()
    shutil.copy(home / "plain" / "config.toml", home / ".hidden")
    return home


def test_every_run_is_found_and_nothing_else(shelf: Path) -> None:
    found = {str(run.path.relative_to(shelf)): run for run in find_runs(shelf)}
    assert list(found) == ["crashed", "deeper/wide", "plain"]
    assert {name: (run.status, run.steps, run.planned_steps) for name, run in found.items()} == {
        "crashed": ("unfinished", 3, None),
        "deeper/wide": ("finished", 3, 3),
        "plain": ("finished", 4, 4),
    }
    assert {name: run.method for name, run in found.items()} == {"crashed": "lora", "deeper/wide": "rslora", "plain": "lora"}


def test_a_run_is_told_as_its_log_and_files_have_it(shelf: Path) -> None:
    run = read_run(shelf / "plain")
    lines = [json.loads(line) for line in (shelf / "plain" / "run.jsonl").read_text().splitlines()]
    summary = json.loads((shelf / "plain" / "summary.json").read_text())
    assert run.best_loss == min(line["eval_loss"] for line in lines if "eval_loss" in line) == summary["best_eval_loss"]
    assert (run.loss, run.seconds, run.objective) == (summary["loss"], summary["seconds"], "sft")
    size = subprocess.run(["find", shelf / "plain", "-type", "f", "-printf", "%s\n"], capture_output=True, text=True, check=True)
    assert run.size_bytes == sum(map(int, size.stdout.split()))
    assert curves(run)["loss"] == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    told = everything(run)
    recipe = json.loads((shelf / "plain" / "adapter" / "luthier.json").read_text())["recipe"]
    assert told["data_digests"] == recipe["data_digests"]
    assert [Path(path).name for path in told["checkpoints"]][-1] == "step-000004"
    assert len(everything(read_run(shelf / "deeper" / "wide"))["anchors"]) == 2


def damaged(shelf: Path, home: Path, file: str, content: bytes | None) -> Path:
    shutil.copytree(shelf / "plain", home / "run")
    if content is None:
        (home / "run" / file).unlink()
    else:
        (home / "run" / file).write_bytes(content)
    return home / "run"


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("config.toml", b"model = [", "is not TOML"),
        ("config.toml", b"\xff\xfe", "is not TOML"),
        ("config.toml", b'model = "m"\n', "data is missing"),
        ("config.toml", None, "there is no settings file"),
        ("summary.json", b"{", "Expecting property name"),
        ("summary.json", b"[]", "holds no JSON object"),
        ("status.json", b"7", "holds no JSON object"),
    ],
)
def test_a_broken_folder_is_listed_as_such(shelf: Path, tmp_path: Path, file: str, content: bytes | None, fault: str) -> None:
    broken = damaged(shelf, tmp_path, file, content)
    shutil.copytree(shelf / "plain", tmp_path / "sound")
    found = {run.name: run for run in find_runs(tmp_path)}
    assert {name: run.status for name, run in found.items()} == {"run": "broken", "sound": "finished"}
    assert fault in found["run"].fault
    with pytest.raises(CheckpointError, match="cannot be read as a run"):
        opened(broken)
    assert chosen(list(found.values()), {}, "best_loss", descending=True)[-1].name == "run"


@pytest.mark.parametrize("content", [b"", b"\xff\n", b'{"step": 1, "loss"', b'[1]\n{"loss": 2}\n{"step": 1, "loss": NaN}\n'])
def test_a_log_without_figures_is_no_fault(shelf: Path, tmp_path: Path, content: bytes) -> None:
    run = read_run(damaged(shelf, tmp_path, "run.jsonl", content))
    assert (run.status, run.steps, run.best_loss, run.loss) == ("finished", 0, None, None)


def test_status_is_that_of_the_process(shelf: Path, tmp_path: Path) -> None:
    run = damaged(shelf, tmp_path, "summary.json", None)
    told = json.loads((run / "status.json").read_text())
    assert told["status"] == "finished"

    def status(**changed: object) -> str:
        (run / "status.json").write_text(json.dumps(told | {"status": "running"} | changed))
        return read_run(run).status

    own = psutil.Process()
    assert status(pid=own.pid, started=own.create_time()) == "running"
    assert status(pid=own.pid, started=own.create_time() - 60) == "killed", "the number was given to another process"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert status(pid=gone.pid) == "killed"
    assert status(pid=gone.pid, host="another machine") == "running"
    assert status(status="interrupted", pid=gone.pid) == "interrupted"
    (run / "status.json").unlink()
    assert read_run(run).status == "unfinished"


def test_a_run_that_fails_says_so(run_settings: Make) -> None:
    settings = run_settings(train={"learning_rate": 1e30, "compile": "off", "epochs": 9})
    with pytest.raises(Exception, match="of step"):
        train(settings)
    assert read_run(settings.out).status == "failed"


def test_runs_are_chosen_and_sorted(shelf: Path) -> None:
    runs = find_runs(shelf)

    def names(where: dict[str, str], sort: str, *, descending: bool = False) -> list[str]:
        return [run.name for run in chosen(runs, where, sort, descending=descending)]

    assert names({"status": "FINISH"}, "steps") == ["crashed", "wide", "plain"], "a word that is part of 'unfinished' too"
    assert names({"method": "rslora"}, "name") == ["wide"]
    assert names({"status": "finished", "name": "plain"}, "name") == ["plain"]
    assert names({}, "steps", descending=True) == ["plain", "crashed", "wide"]
    for where, sort in (({"colour": "red"}, "name"), ({}, "beauty")):
        with pytest.raises(ConfigError, match="needed one of"):
            chosen(runs, where, sort)
    with pytest.raises(ConfigError, match="there is no folder"):
        find_runs(shelf / "absent")


def test_what_differs_is_told_and_only_that(shelf: Path) -> None:
    runs = labelled([opened(shelf / "plain"), opened(shelf / "deeper" / "wide")])
    assert differing(runs) == {
        "lora.r": {"plain": 3, "wide": 5},
        "lora.lora_alpha": {"plain": 6, "wide": 10},
        "lora.use_rslora": {"plain": False, "wide": True},
        "train.max_steps": {"plain": 4, "wide": 3},
        "train.eval_every": {"plain": 2, "wide": None},
        "train.anchors": {"plain": 0, "wide": 1},
    }
    summary = json.loads((shelf / "plain" / "summary.json").read_text())
    figures = final_figures(runs["plain"])
    assert (figures["adapter_bytes"], figures["best_step"]) == (summary["adapter_bytes"], summary["best_step"])


def test_runs_of_one_name_are_told_apart_by_their_paths(shelf: Path, tmp_path: Path) -> None:
    shutil.copytree(shelf / "plain", tmp_path / "plain")
    both = [opened(shelf / "plain"), opened(tmp_path / "plain")]
    assert list(labelled(both)) == [str(shelf / "plain"), str(tmp_path / "plain")]
    with pytest.raises(ConfigError, match="named twice"):
        labelled([both[0], opened(os.path.relpath(shelf / "plain"))])


def test_looking_at_runs_changes_nothing_and_loads_no_torch(shelf: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in shelf.rglob("*")}
    script = (
        "import sys\n"
        "from luthier.train.runs import *\n"
        f"runs = find_runs({str(shelf)!r})\n"
        "[everything(run) for run in runs]\n"
        "print(len(runs), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "False"]
    assert {path: path.stat().st_mtime_ns for path in shelf.rglob("*")} == before


def test_a_run_that_still_goes_on_is_not_resumed(shelf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "going"
    shutil.copytree(shelf / "plain", folder)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        own = psutil.Process(other.pid)
        told = {"status": "running", "pid": other.pid, "started": own.create_time(), "host": platform.node()}
        (folder / "status.json").write_text(json.dumps(told))
        with pytest.raises(CheckpointError, match=f"goes on in process {other.pid}"):
            RunFolder.open(folder)
        other.communicate(b"\n")
    RunFolder.open(folder)
