"""`luthier gate`: may this adapter go out? Its exit status is the verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json, report_error
from luthier.core.errors import ConfigError, LuthierError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from luthier.evaluate import Contestant, GateReport, Suite

NO_VERDICT = 2


def gate(
    adapter: str | None = typer.Argument(None, help="Adapter folder, or the folder of a run: suites are put to it and its base."),
    suite: list[str] = typer.Option(
        [], "--suite", "-s", help="'general', one of its parts, a suite file, or NAME=PATH of a public suite; repeatable."
    ),
    candidate: Path | None = typer.Option(None, help="Instead of an adapter: its scores, a JSON file of `luthier eval --save`."),
    base: Path | None = typer.Option(None, help="With --candidate: the scores of its base on the same suites."),
    incumbent: Path | None = typer.Option(None, help="Scores of the adapter that serves now, on the same suites."),
    policy: Path | None = typer.Option(None, help="TOML file with what is asked. Default: the policy of luthier."),
    show_policy: bool = typer.Option(False, help="Print the policy as TOML, to begin a file of one's own with, and stop."),
    train: str | None = typer.Option(
        None, help="Rows it was trained on: items found there are left out. With an adapter: default those its run named."
    ),
    model: str | None = MODEL,
    limit: int | None = typer.Option(None, min=1, help="With an adapter: only so many items of each suite."),
    batch_tokens: int = typer.Option(2048, min=1, help="With an adapter: tokens in one forward pass, padding included."),
    remember: bool = typer.Option(True, help="With an adapter: keep what the base scored, and use what is kept."),
    html: Path | None = typer.Option(None, help="File for a report with pictures, to be opened without a network."),
    save: Path | None = typer.Option(None, help="Write the decision to this JSON file too."),
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Judge an adapter against its base and the one that serves now. Exit: 0 pass, 1 fail, 3 inconclusive, 2 no verdict."""
    console = make_console(as_json)
    try:
        from luthier.evaluate import DEFAULT_POLICY, Subjects, decide, read_policy, read_scores

        asked = DEFAULT_POLICY if policy is None else read_policy(policy)
        if show_policy:
            typer.echo(asked.to_toml(), nl=False)
            return
        _check_call(adapter, candidate, base, suite, train)
        current = read_scores(incumbent) if incumbent is not None else None
        left_out: dict[str, Any] = {}
        if adapter is not None:
            from luthier.cli.suites import named_suites, put_suites

            suites = named_suites(suite, limit)
            left_out = _trained_on(adapter, train, suites, console)
            options = {"dtype": dtype, "quantize": quantize, "force": force, "console": console}
            loaded, runs = put_suites(adapter, suites, model=model, batch_tokens=batch_tokens, remember=remember, **options)
            ours, theirs = _contestants(adapter, loaded, runs)
        else:
            assert candidate is not None and base is not None
            ours, theirs = read_scores(candidate), read_scores(base)
        subjects = Subjects(ours.adapter, ours.manifest_digest, theirs.fingerprint, current.adapter if current else None)
        served = current.suites if current else None
        report = decide(ours.suites, theirs.suites, served, asked, contaminated=left_out, subjects=subjects)
        _tell(report, html, save, as_json, console)
    except LuthierError as error:
        report_error(error, as_json=as_json)
        raise typer.Exit(NO_VERDICT) from None
    raise typer.Exit(report.exit_code)


def _check_call(adapter: str | None, candidate: Path | None, base: Path | None, suite: list[str], train: str | None) -> None:
    """Raise ConfigError unless there is an adapter with suites, or the scores of both sides, and not both."""
    if adapter is None and (candidate is None or base is None):
        raise ConfigError("name an adapter and its suites, or give the scores of it and its base: --candidate FILE --base FILE")
    if adapter is not None and (candidate is not None or base is not None):
        raise ConfigError("an adapter is put to suites now, --candidate and --base are scores of before; give one of the two")
    if adapter is not None and not suite:
        raise ConfigError("name the suites that the adapter and its base are put to: --suite general --suite my-task.toml")
    if adapter is None and (suite or train):
        raise ConfigError("--suite and --train have no effect on scores that are there; name an adapter instead")


def _trained_on(adapter: str, train: str | None, suites: "Sequence[Suite]", console: Any) -> dict[str, Any]:
    """Return, by suite, the items that are in the training rows."""
    from luthier.cli.loading import recipe_of
    from luthier.data.read import stream_rows
    from luthier.evaluate.contamination import find_contamination

    rows = train or recipe_of(adapter).get("data", {}).get("path")
    if train is None and (rows is None or not Path(rows).is_file()):
        console.print("The training rows are not here, so no item was looked for in them; name them with --train.")
        return {}
    return dict(find_contamination(stream_rows(rows), suites).item_ids)


def _contestants(adapter: str, loaded: Any, runs: "Sequence[Any]") -> "tuple[Contestant, Contestant]":
    from luthier.cli.loading import adapter_folder
    from luthier.evaluate import Contestant
    from luthier.formats.adapters import fingerprint_of
    from luthier.registry.intake import examine

    manifest = examine(adapter_folder(adapter)).manifest_digest
    base = Contestant(tuple(run.base for run in runs), fingerprint=fingerprint_of(loaded.base.model).identity())
    return Contestant(tuple(run.adapter for run in runs), adapter=adapter, manifest_digest=manifest), base


def _tell(report: "GateReport", html: Path | None, save: Path | None, as_json: bool, console: Any) -> None:
    from luthier.cli.output import json_text
    from luthier.core.atomic import write_atomic
    from luthier.evaluate.gate_report import gate_html, gate_table

    if html is not None:
        write_atomic(html, gate_html(report))
    if save is not None:
        write_atomic(save, json_text(report.as_dict()))
    console.print(gate_table(report))
    for written in (html, save):
        if written is not None:
            console.print(f"written: {written}")
    if as_json:
        print_json(report.as_dict())
