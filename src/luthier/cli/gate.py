"""`luthier gate`: may this adapter go out? Its exit status is the verdict."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from luthier.cli.output import JSON, make_console, print_json, report_error
from luthier.core.errors import LuthierError

if TYPE_CHECKING:
    from luthier.evaluate import GateReport, Policy

NO_VERDICT = 2


def gate(
    candidate: Path | None = typer.Option(None, help="Scores of the adapter, a JSON file."),
    base: Path | None = typer.Option(None, help="Scores of its base on the same suites."),
    incumbent: Path | None = typer.Option(None, help="Scores of the adapter that serves now."),
    policy: Path | None = typer.Option(None, help="TOML file with what is asked. Default: the policy of luthier."),
    show_policy: bool = typer.Option(False, help="Print the policy as TOML, to begin a file of one's own with, and stop."),
    html: Path | None = typer.Option(None, help="File for a report with pictures, to be opened without a network."),
    save: Path | None = typer.Option(None, help="Write the decision to this JSON file too."),
    as_json: bool = JSON,
) -> None:
    """Judge an adapter against its base and the one that serves now. Exit: 0 pass, 1 fail, 3 inconclusive, 2 no verdict."""
    try:
        from luthier.evaluate import DEFAULT_POLICY, read_policy

        asked = DEFAULT_POLICY if policy is None else read_policy(policy)
        if show_policy:
            typer.echo(asked.to_toml(), nl=False)
            return
        report = _report(candidate, base, incumbent, asked)
        _tell(report, html, save, as_json)
    except LuthierError as error:
        report_error(error, as_json=as_json)
        raise typer.Exit(NO_VERDICT) from None
    raise typer.Exit(report.exit_code)


def _report(candidate: Path | None, base: Path | None, incumbent: Path | None, policy: "Policy") -> "GateReport":
    from luthier.core.errors import ConfigError
    from luthier.evaluate import Subjects, decide, read_scores

    if candidate is None or base is None:
        raise ConfigError("give the scores of both the adapter and its base: --candidate FILE --base FILE")
    ours, theirs = read_scores(candidate), read_scores(base)
    current = read_scores(incumbent) if incumbent is not None else None
    subjects = Subjects(ours.adapter, ours.manifest_digest, theirs.fingerprint, current.adapter if current else None)
    return decide(ours.suites, theirs.suites, current.suites if current else None, policy, subjects=subjects)


def _tell(report: "GateReport", html: Path | None, save: Path | None, as_json: bool) -> None:
    from luthier.cli.output import json_text
    from luthier.core.atomic import write_atomic
    from luthier.evaluate.gate_report import gate_html, gate_table

    console = make_console(as_json)
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
