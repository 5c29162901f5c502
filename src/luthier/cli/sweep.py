"""`luthier sweep` and `luthier learning-curve`: which settings, and whether more rows would help."""

import json
from pathlib import Path
from typing import Any

import typer

from luthier.cli.output import JSON, make_console, print_json, quiet_transformers
from luthier.cli.train import default_out, named, put_setting
from luthier.core.errors import ConfigError

CONFIG = typer.Option(None, "--config", "-c", help="TOML file with settings of a run; flags win over it.")
MODEL = typer.Option(None, "--model", "-m", help="Base model: Hub id, folder, GGUF file or wheel.")
DATA = typer.Option(None, "--data", "-d", help="Rows: a JSONL or Parquet file, or a Hub data set.")
EVAL_DATA = typer.Option(None, help="Held-out rows to compare on; without it a share of the rows is held out.")
SET = typer.Option([], "--set", "-s", help="Any other setting, as in -s train.batch_rows=8; repeat it.")


def sweep(
    config: Path | None = typer.Option(
        None, "--config", "-c", help="TOML file with settings of a run, and of the search in a section [sweep]; flags win."
    ),
    model: str | None = MODEL,
    data: str | None = DATA,
    eval_data: str | None = EVAL_DATA,
    test_data: str | None = typer.Option(None, help="Rows to check the recommendation on; without it a share of the rows."),
    out: str | None = typer.Option(None, "--out", "-o", help="Folder of the search. Default: runs/<data>-<number>."),
    resume: Path | None = typer.Option(None, help="Go on with the search in this folder; nothing else may be given."),
    trials: int | None = typer.Option(None, help="Runs at most. Default 20."),
    minutes: float | None = typer.Option(None, help="Begin no further trial after so long."),
    steps: int | None = typer.Option(None, help="Optimiser steps of a trial. Default: what [train] says."),
    rank: list[int] = typer.Option([], "--rank", help="Rank to try; repeat it. Default: 4, 8, 16, 32."),
    lowest: float | None = typer.Option(None, "--lr-low", help="Lowest learning rate. Default: a tenth of train.learning_rate."),
    highest: float | None = typer.Option(None, "--lr-high", help="Highest learning rate. Default: ten times that."),
    target: list[str] = typer.Option(
        [], "--target", help="Choice of target_modules: all-linear, attention, mlp, or names with commas; repeat it."
    ),
    pruner: str | None = typer.Option(None, help="Which trials end early: median, halving, or none."),
    seed: int | None = typer.Option(None, help="Of the splits and of the proposals. Default 0."),
    settings: list[str] = SET,
    as_json: bool = JSON,
) -> None:
    """Search rank, alpha, learning rate and target modules by short runs over one base; ends with a recommendation.

    Ctrl-C, or a kill, leaves a folder that --resume goes on with, to the same end.
    """
    console = make_console(as_json)
    rates = None
    if (lowest is None) != (highest is None):
        raise ConfigError("--lr-low and --lr-high belong together; give both or neither")
    if lowest is not None:
        rates = (lowest, highest)
    search: dict[str, Any] = {
        "trials": trials,
        "minutes": minutes,
        "steps": steps,
        "ranks": sorted(rank) or None,
        "learning_rate": rates,
        "targets": [each.split(",") if "," in each else each for each in target] or None,
        "test_path": test_data,
        "pruner": pruner,
        "seed": seed,
    }
    flags = _flags(model, data, eval_data, out, settings) | {"sweep": search}
    if resume is not None:
        if given := sorted(named(flags)) + ["--config"] * (config is not None):
            raise ConfigError(f"--resume takes its settings from the search; also given: {', '.join(given)}. Leave them out.")
        quiet_transformers()
        from luthier.train.sweep.search import Sweep

        found = Sweep.open(resume, console.print)
    else:
        from luthier.train.sweep.settings import SweepSettings

        run, values = _resolved(config, flags, "sweep")
        searched = SweepSettings(**values)
        quiet_transformers()
        from luthier.train.sweep.search import Sweep

        found = Sweep.create(run, searched, console.print)
    from luthier.train.sweep.recommend import RESULT_FILE, recommend

    with _bar(console, "steps") as on_progress:
        found.on_step = on_progress
        recommended = recommend(found) if found.run() else None
    if recommended is None:
        console.print(f"Stopped. Go on with: luthier sweep --resume {found.folder}", soft_wrap=True)
        raise typer.Exit(130)
    result = json.loads((found.folder / RESULT_FILE).read_text())
    _trials_table(console, result)
    for reason in result["reasons"]:
        console.print(reason, highlight=False, soft_wrap=True)
    if result["plot"]:
        console.print(f"picture: {result['plot']}", highlight=False, soft_wrap=True)
    console.print(f"next: {result['next'][0]}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(result)


def learning_curve(
    config: Path | None = CONFIG,
    model: str | None = MODEL,
    data: str | None = DATA,
    eval_data: str | None = EVAL_DATA,
    out: str | None = typer.Option(
        None, "--out", "-o", help="Folder of the curve; called again with it, it goes on. Default: runs/<data>-<number>."
    ),
    share: list[float] = typer.Option([], "--share", help="Share of the rows to train on; repeat it. Default: 1/8, 1/4, 1/2, 1."),
    repeats: int | None = typer.Option(None, help="Runs of each share, on rows and in an order of their own. Default 2."),
    worth: float | None = typer.Option(None, help="What twice the rows must save, as a share of the loss. Default 0.01."),
    seed: int | None = typer.Option(None, help="Of the split and of the shares. Default 0."),
    settings: list[str] = SET,
    as_json: bool = JSON,
) -> None:
    """Train on shares of the rows, fit a power law, and say whether more rows would help."""
    console = make_console(as_json)
    asked = {"shares": sorted(share) or None, "repeats": repeats, "worth": worth, "seed": seed}
    run, values = _resolved(config, _flags(model, data, eval_data, out, settings) | {"curve": asked}, "curve")
    from luthier.train.sweep.settings import CurveSettings

    curve = CurveSettings(**values)
    quiet_transformers()
    from luthier.train.sweep.curve import learning_curve as draw

    with _bar(console, "runs") as on_progress:
        found = draw(run, curve, tell=console.print, on_run=on_progress)
    if found is None:
        console.print("Stopped. The same command goes on.")
        raise typer.Exit(130)
    _curve_table(console, found)
    if as_json:
        print_json(found)


def _flags(model: str | None, data: str | None, eval_data: str | None, out: str | None, settings: list[str]) -> dict[str, Any]:
    flags: dict[str, Any] = {"model": model, "out": out, "data": {"path": data, "eval_path": eval_data}}
    for setting in settings:
        put_setting(flags, setting)
    return flags


def _resolved(config: Path | None, flags: dict[str, Any], section: str) -> tuple[Any, dict[str, Any]]:
    """Return the settings of a run, and the values of the section beside them."""
    from luthier.train.settings import merged, read_settings, read_toml, without_none

    values = read_toml(config) if config is not None else {}
    beside: dict[str, Any] = {name: values.pop(name) for name in ("sweep", "curve") if name in values}
    given = beside.get(section, {})
    if not isinstance(given, dict):
        raise ConfigError(f"{config}: {section} is a value; needed is a section [{section}]")
    own = merged(given, without_none(flags.pop(section)))
    flags["out"] = flags["out"] or default_out(config, flags)
    return read_settings(None, merged(values, without_none(flags))), own


def _bar(console: Any, unit: str) -> Any:
    """Return a context manager that yields a callback (done, total), and shows a bar with the time left in a terminal."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Any:
        columns = (TextColumn(unit), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(unit, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=max(done, total))

    return shown()


def _trials_table(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("trial", "r", "alpha", "learning rate", "target modules", "held-out loss", "ended")
    for row in sorted(result["trials"], key=lambda row: (row["loss"] is None, row["loss"] or 0.0, row["trial"])):
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        named = row["target_modules"]
        named = named if isinstance(named, str) else ", ".join(named)
        mark = " *" if row["trial"] == result["best"]["trial"] else ""
        values = (f"{row['trial']}{mark}", str(row["r"]), f"{row['lora_alpha']:g}", f"{row['learning_rate']:.3g}", named)
        table.add_row(*values, loss, f"{row['ended']} at {row['steps']}")
    console.print(table)


def _curve_table(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("rows", "held-out loss", "steps")
    for point in found["points"]:
        table.add_row(f"{point['rows']:,}", f"{point['loss']:.4f}", f"{point['steps']} (best {point['best_step']})")
    console.print(table)
    law = found["law"]
    for name in ("exponent", "floor", "loss_at_2x", "gain_at_2x"):
        low, middle, high = (law[name][part] for part in ("low", "middle", "high"))
        console.print(f"{name.replace('_', ' ')}: {middle:.4f} ({low:.4f} to {high:.4f})", highlight=False)
    console.print(f"{found['verdict']}: {found['reason']}", highlight=False, soft_wrap=True)
    if found["plot"]:
        console.print(f"picture: {found['plot']}", highlight=False, soft_wrap=True)
