"""The learning curve's runs: nested shares, the same held-out rows, one base, and a folder that can be taken up again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_run import write_rows

from luthier.core.errors import CheckpointError, ConfigError
from luthier.train.run import train
from luthier.train.settings import RunSettings, read_settings
from luthier.train.sweep.curve import learning_curve
from luthier.train.sweep.settings import CurveSettings

Run = Callable[[str], RunSettings]
SHARES = CurveSettings(shares=[0.25, 0.5, 1.0], repeats=2)


@pytest.fixture(scope="module")
def run_in(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a factory of settings of runs in folders of this module."""
    home = tmp_path_factory.mktemp("curves")
    rows = write_rows(home / "rows.jsonl", 40)
    train = {"batch_rows": 4, "learning_rate": 0.01, "compile": "off"}
    values: dict[str, Any] = {"model": str(tiny_folder), "dtype": "float32", "data": {"path": str(rows)}, "lora": {"r": 2}}
    return lambda name: RunSettings(**values, out=str(home / name), train=train)


@pytest.fixture(scope="module")
def drawn(run_in: Run) -> dict[str, Any]:
    """Return what a curve of six runs found."""
    found = learning_curve(run_in("drawn"), SHARES)
    assert found is not None
    return found


def test_shares_are_nested_and_held_out_rows_the_same(drawn: dict[str, Any]) -> None:
    rows = {}
    for point in drawn["points"]:
        data = read_settings(Path(point["run"]) / "config.toml").data
        rows[point["rows"], point["seed"]] = Path(data.path).read_text().splitlines()[: data.limit]
        assert Path(data.eval_path or "").read_text() == Path(drawn["curve"], "rows/held-out.jsonl").read_text()
    assert sorted(rows) == [(8, 0), (8, 1), (17, 0), (17, 1), (34, 0), (34, 1)]
    for seed in (0, 1):
        small, middle, whole = (rows[count, seed] for count in (8, 17, 34))
        assert set(small) < set(middle) <= set(whole)
    assert set(rows[34, 0]) == set(rows[34, 1]) and rows[8, 0] != rows[8, 1]


def test_each_point_is_a_run_like_any_other(drawn: dict[str, Any], tmp_path: Path) -> None:
    point = drawn["points"][3]
    alone = train(read_settings(Path(point["run"]) / "config.toml").changed(out=str(tmp_path / "alone")))
    assert alone.summary["best_eval_loss"] == point["loss"]


def test_the_answer_follows_from_the_interval(drawn: dict[str, Any], run_in: Run) -> None:
    gain, worth = drawn["law"]["gain_at_2x"], drawn["worth"]
    expected = (
        "more rows would help" if gain["low"] > worth else "more rows would not help" if gain["high"] < worth else "not known"
    )
    assert drawn["verdict"] == expected
    assert gain["low"] <= gain["middle"] <= gain["high"]
    assert drawn["worth"] == pytest.approx(0.01 * drawn["law"]["loss_now"]["middle"])
    assert Path(drawn["plot"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path(drawn["curve"], "curve.json").read_text()) == drawn


def test_called_again_it_trains_nothing_anew_and_goes_on_where_runs_are_missing(drawn: dict[str, Any], run_in: Run) -> None:
    run = Path(drawn["points"][5]["run"])
    (run / "point.json").unlink()
    for path in ("run.jsonl", "config.toml", "summary.json"):
        (run / path).unlink()
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    written = {path: path.stat().st_mtime_ns for path in Path(drawn["points"][0]["run"]).rglob("*")}
    assert learning_curve(run_in("drawn"), SHARES) == drawn
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_other_settings_in_the_same_folder_are_refused(drawn: dict[str, Any], run_in: Run) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        learning_curve(run_in("drawn"), SHARES.changed(repeats=3))


def test_shares_that_cannot_be_are_refused(run_in: Run) -> None:
    with pytest.raises(ConfigError, match="must rise"):
        CurveSettings(shares=[1.0, 0.5, 0.25])
    with pytest.raises(ConfigError, match="four runs"):
        CurveSettings(shares=[0.25, 0.5, 1.0], repeats=1)
    with pytest.raises(ConfigError, match="too few for the shares"):
        learning_curve(run_in("same"), CurveSettings(shares=[0.01, 0.02, 1.0]))
