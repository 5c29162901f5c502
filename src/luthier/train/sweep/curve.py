"""learning_curve(): the same run on shares of the rows, and whether more rows would help.

Each share is trained for the same number of epochs, so a larger one takes more steps, as it would for a user with more rows.
All runs are compared on the same held-out rows. Larger shares hold the smaller ones of the same repeat.
"""

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w

from luthier.core.atomic import write_atomic
from luthier.core.errors import CheckpointError, ConfigError, MissingExtraError
from luthier.data.read import read_rows
from luthier.train.run import conclude, graceful_stop
from luthier.train.settings import RunSettings, without_none
from luthier.train.sweep.bench import Bench, carry_out
from luthier.train.sweep.plot import plot_curve
from luthier.train.sweep.power_law import PowerLaw, fit_power_law
from luthier.train.sweep.settings import CurveSettings, check_run
from luthier.train.sweep.splits import on_files, split, write_shuffled

CURVE_FILE, RESULT_FILE, PLOT_FILE, POINT_FILE = "curve.toml", "curve.json", "curve.png", "point.json"
TIMES = 2


def learning_curve(
    run: RunSettings,
    settings: CurveSettings,
    *,
    tell: Callable[[str], None] | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Train on each share into folders below `run.out`, fit the law, and return what was found; None where it was interrupted.

    Called again with the same settings it goes on where it stopped. `on_run` is called with runs done and runs in all.
    Raises: ConfigError, DataError, CheckpointError where the folder holds something else.
    """
    tell = tell or (lambda message: None)
    check_run(run, "luthier learning-curve")
    folder = Path(run.out)
    _begin(folder, run, settings)
    bench = Bench(run, tell)
    asked = runs_of(folder, run, settings)
    points: list[dict[str, Any]] = []
    for done, each in enumerate(asked):
        if on_run is not None:
            on_run(done, len(asked))
        point = _point(bench, each)
        if point is None:
            return None
        points.append(point)
        tell(f"{point['rows']:,} rows: held out {point['loss']:.4f} ({done + 1} of {len(asked)} runs)")
    law = fit_power_law([point["rows"] for point in points], [point["loss"] for point in points])
    found = _result(folder, points, law, settings)
    try:
        plot_curve(points, law, folder / PLOT_FILE, f"{run.model}, {run.data.path}")
        found["plot"] = str(folder / PLOT_FILE)
    except MissingExtraError as error:
        tell(str(error))
    write_atomic(folder / RESULT_FILE, json.dumps(found, indent=2))
    return found


def runs_of(folder: Path, run: RunSettings, settings: CurveSettings) -> list[RunSettings]:
    """Return the settings of every run, the smallest first. Raises: ConfigError where two shares have the same rows."""
    count = len(read_rows(folder / "rows" / "train.jsonl"))
    sizes = [max(1, round(share * count)) for share in settings.shares]
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f"{count} rows are too few for the shares {settings.shares}: they have {sizes} rows")
    return [
        on_files(
            run,
            folder / "rows" / f"train-{repeat}.jsonl",
            folder / "rows" / "held-out.jsonl",
            folder / f"rows-{size}-{repeat}",
            limit=size,
            loop=run.train.changed(seed=run.train.seed + repeat),
        )
        for size in sizes
        for repeat in range(settings.repeats)
    ]


def _begin(folder: Path, run: RunSettings, settings: CurveSettings) -> None:
    """Tell the rows apart and write down what is asked; where that was done, see that it is the same."""
    values = without_none({"run": run.model_dump(mode="json"), "curve": settings.model_dump(mode="json")})
    path = folder / CURVE_FILE
    if path.exists():
        if tomllib.loads(path.read_text()) != values:
            raise CheckpointError(f"{folder} holds a learning curve with other settings; choose another --out")
        return
    if folder.exists() and (not folder.is_dir() or any(entry.name != "rows" for entry in folder.iterdir())):
        raise CheckpointError(f"{folder} is not an empty folder; choose another --out")
    split(run.data, folder / "rows", eval_fraction=settings.eval_fraction, test=None, seed=settings.seed)
    rows = read_rows(folder / "rows" / "train.jsonl").rows
    for repeat in range(settings.repeats):
        write_shuffled(rows, folder / "rows" / f"train-{repeat}.jsonl", settings.seed + repeat)
    write_atomic(path, tomli_w.dumps(values))


def _point(bench: Bench, settings: RunSettings) -> dict[str, Any] | None:
    """Carry out one run, unless it is finished, and return its place on the curve."""
    path = Path(settings.out) / POINT_FILE
    if not path.exists():
        with bench.trainer(settings) as trainer, graceful_stop(trainer):
            ended = carry_out(trainer, lambda step, loss: False, lambda step: None)
            if ended == "interrupted":
                return None
            summary = conclude(trainer, ended)
        point = {
            "rows": settings.data.limit,
            "loss": summary["best_eval_loss"],
            "best_step": summary["best_step"],
            "steps": summary["steps"],
            "seed": settings.train.seed,
            "run": settings.out,
        }
        write_atomic(path, json.dumps(point))
        shutil.rmtree(Path(settings.out) / "checkpoints", ignore_errors=True)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _result(folder: Path, points: list[dict[str, Any]], law: PowerLaw, settings: CurveSettings) -> dict[str, Any]:
    most = max(point["rows"] for point in points)
    gain, now = law.gain_at(TIMES), law.loss_at(most)
    worth = settings.worth * now[1]
    verdict = "more rows would help" if gain[0] > worth else "more rows would not help" if gain[2] < worth else "not known"
    said = {
        "more rows would help": f"{TIMES} times the rows would save at least {worth:.4f}, which is worth it.",
        "more rows would not help": f"{TIMES} times the rows would save less than {worth:.4f}.",
        "not known": f"Whether {TIMES} times the rows would save {worth:.4f} these runs do not tell; more repeats would.",
    }[verdict]
    band = ("low", "middle", "high")
    return {
        "curve": str(folder),
        "points": points,
        "law": {
            "exponent": dict(zip(band, law.exponent, strict=True)),
            "floor": dict(zip(band, law.floor, strict=True)),
            "loss_now": dict(zip(band, now, strict=True)),
            "loss_at_2x": dict(zip(band, law.loss_at(TIMES * most), strict=True)),
            "gain_at_2x": dict(zip(band, gain, strict=True)),
        },
        "worth": worth,
        "verdict": verdict,
        "reason": f"{said} Expected: {gain[1]:.4f} ({gain[0]:.4f} to {gain[2]:.4f}) nats per token less than {now[1]:.4f}.",
        "plot": None,
    }
