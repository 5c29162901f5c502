"""`luthier gate`: may this adapter go out? Its exit status is the verdict."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json, report_error
from luthier.cli.registry_opening import REGISTRY
from luthier.core.errors import ConfigError, LuthierError

if TYPE_CHECKING:
    from luthier.evaluate import GateReport, Policy

NO_VERDICT = 2


def gate(
    adapter: str | None = typer.Argument(None, help="Adapter folder, or the folder of a run: suites are put to it and its base."),
    suite: list[str] = typer.Option(
        [], "--suite", "-s", help="'general', one of its parts, a suite file, or NAME=PATH of a public suite; repeatable."
    ),
    candidate: Path | None = typer.Option(None, help="Instead of an adapter: its scores, a JSON file of `luthier eval --save`."),
    base: Path | None = typer.Option(None, help="With --candidate: the scores of its base on the same suites."),
    incumbent: str | None = typer.Option(
        None, help="What serves now: an adapter's or run's folder, NAME:VERSION of the registry, or scores on the same suites."
    ),
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
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Judge an adapter against its base and the one that serves now. Exit: 0 pass, 1 fail, 3 inconclusive, 2 no verdict."""
    console = make_console(as_json)
    try:
        from luthier.cli.judging import judged
        from luthier.evaluate import DEFAULT_POLICY, read_policy, read_scores

        asked = DEFAULT_POLICY if policy is None else read_policy(policy)
        if show_policy:
            typer.echo(asked.to_toml(), nl=False)
            return
        _check_call(adapter, candidate, base, suite, train, incumbent, asked)
        current = read_scores(incumbent) if incumbent is not None and Path(incumbent).is_file() else None
        left_out: dict[str, Any] = {}
        if adapter is not None:
            from luthier.cli.judging import check_fits, check_suites, contestants, incumbent_on, put_on, trained_on
            from luthier.cli.loading import load_served
            from luthier.cli.suites import named_suites, rows_answered

            suites = named_suites(suite, limit)
            check_suites(suites, asked, has_incumbent=incumbent is not None)
            left_out = trained_on(adapter, train, suites, console)
            rival = _folder_of(incumbent, registry) if incumbent is not None and current is None else None
            run = {"batch_tokens": batch_tokens, "console": console}
            where: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "console": console, "force": force}
            with load_served(model, adapter, rows=rows_answered(suites), **where) as loaded:
                if rival is not None:
                    check_fits(rival, loaded, force=force)
                ours, theirs = contestants(adapter, loaded, suites, remember=remember, **run)
                if rival is not None:
                    current = incumbent_on(rival, put_on(rival, loaded, force=force), suites, name=str(incumbent), **run)
        else:
            assert candidate is not None and base is not None
            ours, theirs = read_scores(candidate), read_scores(base)
        report = judged(ours, theirs, current, asked, left_out)
        _tell(report, html, save, as_json, console)
    except LuthierError as error:
        report_error(error, as_json=as_json)
        raise typer.Exit(NO_VERDICT) from None
    raise typer.Exit(report.exit_code)


def _check_call(
    adapter: str | None,
    candidate: Path | None,
    base: Path | None,
    suite: list[str],
    train: str | None,
    incumbent: str | None,
    policy: "Policy",
) -> None:
    """Raise ConfigError unless there is an adapter with suites, or the scores of both sides, and not both."""
    if adapter is None and (candidate is None or base is None):
        raise ConfigError("name an adapter and its suites, or give the scores of it and its base: --candidate FILE --base FILE")
    if adapter is not None and (candidate is not None or base is not None):
        raise ConfigError("an adapter is put to suites now, --candidate and --base are scores of before; give one of the two")
    if adapter is not None and not suite:
        raise ConfigError("name the suites that the adapter and its base are put to: --suite general --suite my-task.toml")
    if adapter is None and (suite or train):
        raise ConfigError("--suite and --train have no effect on scores that are there; name an adapter instead")
    if incumbent is None or Path(incumbent).is_file():
        return
    if adapter is None:
        raise ConfigError(f"--incumbent {incumbent} is no file; beside the scores of --candidate and --base it takes scores too")
    if policy.incumbent == "ignored":
        raise ConfigError(f"policy '{policy.name}' ignores the incumbent, so it would be run for nothing; leave --incumbent out")


def _folder_of(incumbent: str, registry: str | None) -> Path:
    """Return the folder of an adapter, of a run, or of a version in the registry."""
    if Path(incumbent).is_dir():
        return Path(incumbent)
    if ":" not in incumbent:
        raise ConfigError(f"--incumbent {incumbent} is not there; needed a file of scores, an adapter's folder, or NAME:VERSION")
    from luthier.cli.registry_opening import opened
    from luthier.registry.resolving import resolve

    return resolve(opened(registry), incumbent)


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
