"""`luthier runs trajectory`: the adapters that a run kept along the way, on held-out rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import DTYPE, JSON, json_text, make_console, print_json
from luthier.cli.progress import progress_bar
from luthier.core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from luthier.evaluate.judgement import Judgement, Side


def trajectory(
    run: Path = typer.Argument(help="Folder of a run with train.anchors."),
    data: str | None = typer.Option(None, "--data", "-d", help="Held-out rows. Default: those the run named."),
    limit: int | None = typer.Option(None, min=1, help="Judge only so many rows."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Folder for the table and the picture. Default: RUN/trajectory."),
    max_new_tokens: int = typer.Option(128, min=1, help="Longest answer, in tokens."),
    batch_rows: int = typer.Option(32, min=1, help="Rows answered at once."),
    case_folded: bool = typer.Option(False, help="Upper and lower case count as the same."),
    dtype: str = DTYPE,
    as_json: bool = JSON,
) -> None:
    """Judge each anchor of a run on the same rows, and draw the metrics over its steps. The base answers once."""
    console = make_console(as_json)
    from luthier.train.runlog import ANCHORS
    from luthier.train.runs import opened, step_folders

    settings = opened(run).settings
    assert settings is not None  # `opened` refuses a run without
    anchors = step_folders(run / ANCHORS)
    if not anchors:
        raise ConfigError(f"{run} kept no adapters along the way; train with: -s train.anchors=8")
    path = data or settings.data.eval_path
    if path is None:
        raise ConfigError("the run names no file of held-out rows; say which with --data")
    where = {"dtype": dtype, "console": console}
    rows = {"path": path, "limit": limit, "settings": settings.data}
    how = {"max_new_tokens": max_new_tokens, "batch_rows": batch_rows, "case_folded": case_folded}
    points: dict[int, Judgement] = {}
    for anchor, judgement in _judged(anchors, rows, how, where):
        points[int(anchor.name.removeprefix("step-"))] = judgement
    first = next(iter(points.values()))
    base = _metrics(first.base)
    found = [{"step": step, **_metrics(each.adapter), "won": each.won, "lost": each.lost} for step, each in points.items()]
    result: dict[str, Any] = {"run": str(run), "data": path, "rows": first.rows, "base": base, "anchors": found}
    folder = out or run / "trajectory"
    _show(console, result)
    _write(console, result, folder, f"{settings.model}, {path}")
    if as_json:
        print_json(result)


def _judged(
    anchors: list[Path], rows: dict[str, Any], how: dict[str, Any], where: dict[str, Any]
) -> "Iterator[tuple[Path, Judgement]]":
    """Yield each anchor with its judgement, all on one base that is loaded once."""
    from luthier.cli.judging import put_on
    from luthier.cli.loading import load_served
    from luthier.data.encode import encode
    from luthier.data.messages import to_examples
    from luthier.data.read import read_rows
    from luthier.evaluate.judgement import judge

    settings = rows["settings"]
    templates = {"prompt_template": settings.prompt, "completion_template": settings.completion, "system": settings.system}
    examples = to_examples(read_rows(rows["path"], limit=rows["limit"]).rows, **templates)
    with load_served(None, str(anchors[0]), rows=how["batch_rows"], **where) as loaded:
        encoded = encode(examples, loaded.base.tokenizer, max_length=settings.max_length).rows
        model, tokenizer = loaded.base.model, loaded.base.tokenizer
        known = None
        for index, anchor in enumerate(anchors):
            if index:
                loaded = put_on(anchor, loaded, force=False, name=anchor.name)
            with progress_bar(where["console"]) as on_progress:

                def tell(stage: str, done: int, total: int, anchor: Path = anchor, tell: Any = on_progress) -> None:
                    tell(stage.replace("adapter", anchor.name), done, total)

                told: dict[str, Any] = {"encoded": encoded, "served": loaded.served, "known": known, "on_progress": tell}
                judgement = judge(model, tokenizer, examples, **how, **told)
            known = known or judgement
            yield anchor, judgement


def _metrics(side: "Side | None") -> dict[str, float]:
    """Return the figures of one contestant by name: shares of rows, and the loss."""
    assert side is not None  # an anchor is an adapter
    found = {"exact match": side.exact.value}
    if side.json is not None:
        found |= {"valid JSON": side.json.valid.value, "exact JSON": side.json.exact.value}
        found |= {f"field {name}": share.value for name, share in side.json.fields.items()}
    return found | ({"loss": side.loss.loss} if side.loss else {})


def _show(console: Any, result: dict[str, Any]) -> None:
    from rich.table import Table

    names = list(result["base"])
    table = Table("step", *names, "won", "lost", box=None)
    table.add_row("base", *(_in_words(name, result["base"][name]) for name in names))
    for point in result["anchors"]:
        figures = (_in_words(name, point[name]) for name in names)
        table.add_row(str(point["step"]), *figures, str(point["won"]), str(point["lost"]))
    console.print(table, highlight=False)


def _in_words(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{value:.1%}"


def _write(console: Any, result: dict[str, Any], folder: Path, title: str) -> None:
    """Write the table as JSON, and its picture where that can be drawn."""
    from luthier.core.atomic import write_atomic
    from luthier.train.plot import plot_trajectory

    write_atomic(folder / "trajectory.json", json_text(result))
    console.print(f"table: {folder / 'trajectory.json'}", highlight=False, soft_wrap=True)
    metrics = {name: [(point["step"], point[name]) for point in result["anchors"]] for name in result["base"]}
    try:
        plot_trajectory(metrics, result["base"], folder / "trajectory.png", title)
    except MissingExtraError as error:
        console.print(str(error))
        return
    console.print(f"picture: {folder / 'trajectory.png'}", highlight=False, soft_wrap=True)
