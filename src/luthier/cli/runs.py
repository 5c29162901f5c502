"""`luthier runs list | show | compare | plot | trajectory`: what became of training runs, one beside the other."""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.runs_trajectory import trajectory
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.train.runs import RunEntry

runs_app = typer.Typer(
    help="Training runs in folders: list, compare and plot them, and judge the adapters that were kept along the way.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
runs_app.command("trajectory")(trajectory)

RUNS = typer.Argument(help="Folders of runs.")


@runs_app.command("list")
def list_runs(
    folder: Path = typer.Argument(Path("runs"), help="Folder to look in, and below."),
    where: list[str] = typer.Option(
        [], "--where", "-w", help="Only runs whose column contains a word, as in -w status=finished; repeat it."
    ),
    sort: str = typer.Option("name", help="Column to sort by: any of those in --json."),
    descending: bool = typer.Option(False, help="Largest first."),
    as_json: bool = JSON,
) -> None:
    """List the runs below a folder. One that cannot be read is listed with what is wrong with it."""
    console = make_console(as_json)
    from luthier.train.runs import chosen, find_runs

    wanted = {}
    for each in where:
        key, equals, word = each.partition("=")
        if not equals:
            raise ConfigError(f"--where wants COLUMN=WORD, such as status=finished; given: {each!r}")
        wanted[key] = word
    found = chosen(find_runs(folder), wanted, sort, descending=descending)
    if as_json:
        print_json({"folder": str(folder), "runs": [run.as_dict() for run in found]})
        return
    if not found:
        console.print(f"No runs in {folder}" + (" that are as --where says" if wanted else ""), highlight=False)
        return
    from rich.table import Table

    table = Table("run", "status", "model", "data", "objective", "method", box=None)
    for right in ("steps", "held out", "loss", "time", "size", "changed"):
        table.add_column(right, justify="right", no_wrap=True)
    for run in found:
        table.add_row(*_cells(run, folder))
    console.print(table, highlight=False)
    for run in found:
        if run.fault:
            console.print(f"{run.path} is broken: {run.fault}", highlight=False, soft_wrap=True)


@runs_app.command("show")
def show(run: Path = typer.Argument(help="Folder of a run."), as_json: bool = JSON) -> None:
    """Show one run: its settings, what came of it, its trackers and the adapters it holds."""
    console = make_console(as_json)
    from luthier.train.runs import everything, final_figures, opened
    from luthier.train.tracking.base import flattened

    found = opened(run)
    told = everything(found)
    if as_json:
        print_json(told)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for key, value in final_figures(found).items():
        table.add_row(key, _plain(key, value))
    for role, digest in told["data_digests"].items():
        table.add_row(f"rows ({role})", Text(digest))
    for tracker, note in told["trackers"].items():
        table.add_row(tracker, Text(f"run {note.get('id')}" + (f": {note['fault']}" if note.get("fault") else "")))
    for what in ("checkpoints", "anchors"):
        if told[what]:
            table.add_row(what, Text(", ".join(Path(path).name for path in told[what])))
    for key, value in flattened(told["settings"]).items():
        table.add_row(key, Text(str(value)))
    console.print(table, highlight=False)


@runs_app.command("compare")
def compare(runs: list[Path] = RUNS, as_json: bool = JSON) -> None:
    """Lay runs side by side: the settings in which they differ, and what came of each."""
    console = make_console(as_json)
    from luthier.train.runs import differing, final_figures, labelled, opened

    if len(runs) < 2:
        raise ConfigError("name at least two runs to compare")
    found = labelled([opened(run) for run in runs])
    settings = differing(found)
    figures = {label: final_figures(run) for label, run in found.items()}
    if as_json:
        print_json({"settings": settings, "figures": figures})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table("", *found, box=None)
    for key, values in settings.items():
        table.add_row(key, *(Text("-" if value is None else str(value)) for value in values.values()))
    table.add_section()
    for key in next(iter(figures.values())):
        table.add_row(key, *(_plain(key, each[key]) for each in figures.values()), style="bold" if key == "best_loss" else "")
    console.print(table, highlight=False)


@runs_app.command("plot")
def plot(
    runs: list[Path] = RUNS,
    out: Path = typer.Option(..., "--out", "-o", help="PNG to write."),
    as_json: bool = JSON,
) -> None:
    """Draw the held-out and training losses of runs over each other."""
    console = make_console(as_json)
    from luthier.train.plot import plot_runs
    from luthier.train.runs import curves, labelled, opened

    found = {label: curves(run) for label, run in labelled([opened(run) for run in runs]).items()}
    if empty := [label for label, drawn in found.items() if not any(drawn.values())]:
        raise ConfigError(f"nothing is logged yet of {', '.join(empty)}; leave it out")
    plot_runs(found, out)
    console.print(f"picture: {out}", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"picture": str(out), "runs": found})


def _cells(run: "RunEntry", folder: Path) -> list[Any]:
    from rich.text import Text

    place = run.path.relative_to(folder)
    name = Text(str(place) if place != Path(".") else run.name)
    if run.fault:
        return [name, Text(run.status, style="red")]
    steps = str(run.steps) if run.planned_steps in (None, run.steps) else f"{run.steps}/{run.planned_steps}"
    figures = [_plain(key, getattr(run, key)) for key in ("best_loss", "loss", "seconds", "size_bytes", "changed")]
    model, data = (Text(Path(text).name) for text in (run.model, run.data))
    return [name, run.status, model, data, run.objective, run.method, steps, *figures]


def _plain(key: str, value: Any) -> str:
    """Return a figure in words."""
    from luthier.core.words import duration, gib

    if value is None:
        return "-"
    if key == "seconds":
        return duration(value)
    if key.endswith("_bytes"):
        return gib(value)
    if key == "changed":
        return f"{datetime.fromtimestamp(value):%Y-%m-%d %H:%M}"
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
