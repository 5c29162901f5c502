"""`luthier baseline`: what do pairs leave on the table? A full fine-tune beside several ranks, by one loop on the same rows."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from luthier.cli.output import JSON, json_text, make_console, print_json
from luthier.cli.train import put_setting
from luthier.core.errors import ConfigError, MissingExtraError, TrainingError


def baseline(
    run: Path = typer.Argument(help="Settings to compare with: a TOML file, or the folder of a run."),
    out: Path = typer.Option(..., "--out", "-o", help="Folder of the comparison; called again, it goes on where it stopped."),
    rank: list[int] = typer.Option([4, 16, 64], "--rank", help="Rank to train pairs of; repeat it. alpha keeps its ratio to r."),
    full_learning_rate: float = typer.Option(
        2e-5, help="Peak learning rate of the full fine-tune, by default a tenth of what pairs usually have."
    ),
    limit: int | None = typer.Option(None, min=1, help="Train on the first so many rows only: the smaller scale."),
    max_steps: int | None = typer.Option(None, min=1, help="Stop each after so many optimiser steps."),
    match: int = typer.Option(0, min=0, help="Answer so many held-out rows with each and count exact matches."),
    settings: list[str] = typer.Option([], "--set", "-s", help="Any other setting, as in -s train.batch_rows=8; repeat it."),
    as_json: bool = JSON,
) -> None:
    """Train every weight, and pairs of several ranks, on the same rows, each in a process of its own, and compare."""
    console = make_console(as_json)
    from luthier.train.baseline import FULL, check_floats, contenders
    from luthier.train.plot import plot_baseline
    from luthier.train.settings import read_settings

    given: dict[str, Any] = {"out": str(out), "data": {"limit": limit}, "train": {"max_steps": max_steps}}
    for setting in settings:
        put_setting(given, setting)
    resolved = read_settings(run / "config.toml" if run.is_dir() else run, given)
    if match and not resolved.data.eval_path:
        raise ConfigError("--match answers held-out rows of a file; the settings name none (data.eval_path)")
    asked = contenders(resolved, rank, full_learning_rate)
    check_floats(resolved.model)
    found: dict[str, dict[str, Any]] = {}
    for name, each in asked.items():
        console.rule(name)
        found[name] = _trained(out / name, each.to_toml()) | {"exact_match": _matched(out / name, match) if match else None}
    full = found[FULL]
    pairs = {r: found[f"r{r}"] for r in sorted(rank)}
    _table(console, found)
    picture = out / "baseline.png"
    try:
        plot_baseline(pairs, full, picture, f"{resolved.model}, {resolved.data.path}")
        console.print(f"picture: {picture}")
    except MissingExtraError as error:
        console.print(str(error))
    from luthier.core.atomic import write_atomic

    write_atomic(out / "baseline.json", json_text(found))
    if as_json:
        print_json(found)


def _trained(folder: Path, text: str) -> dict[str, Any]:
    """Train the run in `folder` by the settings `text`, or carry it on, unless it is finished; return what came of it."""
    from luthier.core.atomic import write_atomic

    config = folder / "config.toml"
    if config.exists() and config.read_text() != text:
        raise ConfigError(f"{folder} holds a run with other settings; choose another --out, or give the settings it has")
    if not (folder / "summary.json").exists():
        if config.exists():
            words = ["--resume", str(folder)]
        else:
            asked = folder.with_suffix(".toml")
            write_atomic(asked, text)
            words = ["--config", str(asked)]
        _luthier("train", *words, "--json")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "parameters": summary["trained_parameters"],
        "eval_loss": summary["best_eval_loss"],
        "seconds": summary["seconds"],
        "peak_bytes": summary["peak_bytes"],
        "adapter_bytes": summary["adapter_bytes"],
        "adapter": summary["adapter"],
    }


def _matched(folder: Path, match: int) -> float:
    answers = folder / f"answers-{match}.json"
    if not answers.exists():
        _luthier("eval", str(folder), "--limit", str(match), "--save", str(answers), "--json")
    judged: dict[str, Any] = json.loads(answers.read_text())
    return float(judged["adapter"]["exact"]["value"])


def _luthier(*words: str) -> dict[str, Any]:
    """Run a command of this program as a process of its own, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, "-m", "luthier.cli.app", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode == 130:
        raise KeyboardInterrupt
    result: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
    if done.returncode:
        told = result.get("error", {}).get("message", f"exit status {done.returncode}")
        raise TrainingError(f"luthier {' '.join(words)} failed: {told}")
    return result


def _table(console: Any, found: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    from luthier.train.display import duration, gib

    table = Table("", "trained", "held-out loss", "exact match", "time", "memory", "on disk")
    for name, each in found.items():
        loss, exact = each["eval_loss"], each["exact_match"]
        table.add_row(
            name,
            f"{each['parameters']:,}",
            "" if loss is None else f"{loss:.4f}",
            "" if exact is None else f"{exact:.1%}",
            duration(each["seconds"]),
            gib(each["peak_bytes"]),
            gib(each["adapter_bytes"]),
        )
    console.print(table)
    console.print("The memory of 'full' includes the base, which is kept beside the copy that is trained.")
