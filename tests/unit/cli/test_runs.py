"""`luthier runs`: lists, tables, pictures and trajectories of real runs; and `luthier train --track`."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier.train.run import train
from luthier.train.settings import RunSettings

Luthier = Callable[..., Any]


def png_size(path: Path) -> tuple[int, int]:
    raw = path.read_bytes()
    assert raw.startswith(b"\x89PNG")
    return struct.unpack(">II", raw[16:24])  # type: ignore[return-value]


@pytest.fixture(scope="module")
def shelf(tiny_folder: Path, rows_file: Path, held_out_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a short run, one with anchors that learns its rows, and a broken one."""
    home = tmp_path_factory.mktemp("shelf")

    def run(name: str, **sections: dict[str, Any]) -> None:
        values: dict[str, Any] = {
            "model": str(tiny_folder),
            "out": str(home / name),
            "dtype": "float32",
            "data": {"path": str(rows_file), "eval_path": str(held_out_file)},
            **sections,
        }
        train(RunSettings(**values))

    run("short", lora={"r": 2}, train={"max_steps": 2, "batch_rows": 4, "compile": "off"})
    learning = {"epochs": 150, "learning_rate": 0.02, "batch_rows": 11, "eval_every": 50, "anchors": 2, "compile": "off"}
    run("[red]learns", lora={"r": 16}, train=learning)
    (home / "broken").mkdir()
    (home / "broken" / "config.toml").write_text("model = [")
    (home / "broken" / "run.jsonl").write_text("")
    return home


def test_runs_are_listed_for_people_and_programs(luthier: Luthier, shelf: Path) -> None:
    told = json.loads(luthier("runs", "list", shelf, "--json").out)["runs"]
    assert [(run["name"], run["status"]) for run in told] == [
        ("[red]learns", "finished"),
        ("short", "finished"),
        ("broken", "broken"),
    ]
    assert (told[1]["steps"], told[1]["method"], told[1]["objective"]) == (2, "lora", "sft")
    said = luthier("runs", "list", shelf)
    assert said.status == 0
    lines = [line.split() for line in said.out.splitlines()]
    assert ["[red]learns", "finished"] in [line[:2] for line in lines]
    assert f"{told[0]['best_loss']:.4f}" in said.out
    assert f"{shelf / 'broken'} is broken:" in said.out


def test_a_list_is_narrowed_and_sorted(luthier: Luthier, shelf: Path) -> None:
    def names(*words: str) -> list[str]:
        return [run["name"] for run in json.loads(luthier("runs", "list", shelf, *words, "--json").out)["runs"]]

    assert names("-w", "status=finished", "--sort", "best_loss", "--descending") == ["short", "[red]learns"]
    assert names("--where", "status=finished", "--where", "name=short") == ["short"]
    said = luthier("runs", "list", shelf, "--where", "status")
    assert (said.status, "--where wants COLUMN=WORD" in said.err) == (2, True)
    assert luthier("runs", "list", shelf / "absent").status == 2
    assert "No runs in" in luthier("runs", "list", shelf, "-w", "name=nobody").out


def test_one_run_is_shown_whole(luthier: Luthier, shelf: Path) -> None:
    said = luthier("runs", "show", shelf / "[red]learns")
    assert said.status == 0
    for line in ("train.learning_rate 0.02", "anchors step-000000, step-000075, step-000150", "lora.r 16"):
        assert line in " ".join(said.out.split())
    told = json.loads(luthier("runs", "show", shelf / "short", "--json").out)
    assert told["settings"]["lora"]["r"] == 2
    broken = luthier("runs", "show", shelf / "broken")
    assert (broken.status, "cannot be read as a run" in broken.err) == (1, True)


def test_runs_are_compared_by_what_differs(luthier: Luthier, shelf: Path) -> None:
    both = (shelf / "short", shelf / "[red]learns")
    told = json.loads(luthier("runs", "compare", *both, "--json").out)
    assert told["settings"]["lora.r"] == {"short": 2, "[red]learns": 16}
    assert "model" not in told["settings"]
    assert told["figures"]["short"]["steps"] == 2
    said = luthier("runs", "compare", *both)
    assert "[red]learns" in said.out
    assert "train.learning_rate" in said.out
    alone = luthier("runs", "compare", shelf / "short")
    assert (alone.status, "at least two" in alone.err) == (2, True)


def test_runs_are_plotted_over_each_other(luthier: Luthier, shelf: Path, tmp_path: Path) -> None:
    said = luthier("runs", "plot", shelf / "short", shelf / "[red]learns", "--out", "both.png", "--json")
    assert said.status == 0, said.err
    assert png_size(tmp_path / "both.png") == (2 * 660, 480)  # a panel for each of the two losses, at 120 dots an inch
    curves = json.loads(said.out)["runs"]
    assert [step for step, _ in curves["[red]learns"]["eval_loss"]] == [50, 100, 150]


def test_a_trajectory_is_what_eval_says_of_each_anchor(
    luthier: Luthier, shelf: Path, held_out_file: Path, tmp_path: Path
) -> None:
    run = shelf / "[red]learns"
    said = luthier("runs", "trajectory", run, "--out", tmp_path / "way", "--max-new-tokens", "12", "--json")
    assert said.status == 0, said.err
    told = json.loads(said.out)
    assert json.loads((tmp_path / "way" / "trajectory.json").read_text()) == told
    assert [point["step"] for point in told["anchors"]] == [0, 75, 150]
    for point in told["anchors"]:
        anchor = run / "anchors" / f"step-{point['step']:06d}"
        words = ("eval", anchor, "--data", held_out_file, "--max-new-tokens", "12", "--json")
        judged = json.loads(luthier(*words).out)
        assert point["exact match"] == judged["adapter"]["exact"]["value"]
        assert point["loss"] == pytest.approx(judged["adapter"]["loss"]["loss"], rel=1e-6)
        assert (point["won"], point["lost"]) == (judged["won"], judged["lost"])
        assert told["base"]["exact match"] == judged["base"]["exact"]["value"]
    first, _, last = told["anchors"]
    assert first["loss"] == pytest.approx(told["base"]["loss"], rel=1e-6)
    assert last["exact match"] > first["exact match"], "three of the five rows were trained on"
    assert png_size(tmp_path / "way" / "trajectory.png") == (2 * 660, 480)


def test_a_run_without_anchors_has_no_trajectory(luthier: Luthier, shelf: Path) -> None:
    said = luthier("runs", "trajectory", shelf / "short")
    assert (said.status, "-s train.anchors=8" in said.err) == (2, True)


def test_train_tells_its_trackers_and_prints_json_alone(
    luthier: Luthier, tiny_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    words = ("train", "-m", tiny_folder, "-d", rows_file, "--max-steps", "2", "-s", "train.track_patience=300")
    said = luthier(*words, "--track", "trackio", "--track", "tensorboard", "--json")  # trackio prints to stdout where it lives
    assert said.status == 0, said.err
    found = json.loads(said.out)
    lines = (tmp_path / found["run"] / "run.jsonl").read_text().splitlines()
    assert [(each["tracker"], each["delivered"]) for each in found["tracking"]] == [
        ("trackio", len(lines)),
        ("tensorboard", len(lines)),
    ]
    assert f"tensorboard: {len(lines)} lines, run" in said.err
    assert list((tmp_path / found["run"] / "tracking" / "tensorboard").glob("events.out.tfevents.*"))


def test_a_tracker_that_is_none_is_refused(luthier: Luthier, tiny_folder: Path, rows_file: Path) -> None:
    said = luthier("train", "-m", tiny_folder, "-d", rows_file, "--track", "tensorbord")
    assert (said.status, "tensorbord" in said.err) == (2, True)
