"""`luthier registry rebase`: what depends on a base that changes, trained again on the new one and judged."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, json_text, make_console, print_json, quiet_transformers
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, fingerprint_of_base, opened, table_of
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.registry.place import Registry
    from luthier.registry.rebase import Dependent, Judge, Judgement, Rebase, Successor

FAILED, UNDECIDED = 1, 3


def rebase(
    old: str = typer.Argument(help="The base that changes: its name in the registry, or the beginning of its fingerprint."),
    new: str = typer.Argument(help="The base to train on instead: Hub id, folder, GGUF file or wheel."),
    run: bool = typer.Option(False, "--run", help="Train, register and judge the successors. Default: only show the plan."),
    out: Path = typer.Option(Path("runs/rebase"), "--out", "-o", help="Folder for the runs; finished ones are kept."),
    suite: list[str] = typer.Option(
        [], "--suite", "-s", help="With --run: judge each successor on this suite, named as for luthier gate; repeatable."
    ),
    policy: Path | None = typer.Option(None, help="With --suite: TOML file with what is asked. Default: the policy of luthier."),
    limit: int | None = typer.Option(None, min=1, help="With --suite: only so many items of each."),
    batch_tokens: int = typer.Option(2048, min=1, help="With --suite: tokens in one forward pass, padding included."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Plan the move of every adapter from one base to another; with --run carry it out. Exit status with --run: 0 all may
    follow, 1 some failed, 3 some are undecided.

    With --suite each successor goes through the gate, against the new base and against its predecessor on the old one; the
    decision is kept in the registry.
    """
    console = make_console(as_json)
    _check_call(run, suite, policy, limit)
    from luthier.registry.rebase import check_new_base, plan_rebase
    from luthier.registry.rebase import rebase as carry_out

    store = opened(registry)
    who = caller(store, actor, "register") if run else ""
    judge = _judge(store, suite, policy, limit, who, {"batch_tokens": batch_tokens, "console": console}) if suite else None
    with store.database.reading() as session:
        plan = plan_rebase(session, old)
    if not run:
        _show_plan(console, plan, new)
        if as_json:
            print_json({"old": old, "new": new, "dependents": [_told(dependent) for dependent in plan.dependents]})
        return
    check_new_base(plan, fingerprint_of_base(new, console), new)

    def retrain(dependent: "Dependent") -> Path:
        return _retrain(dependent, new, out / dependent.version.replace(":", "-"), console)

    done = carry_out(store, plan, retrain, actor=who, judge=judge, tell=lambda message: console.print(message, highlight=False))
    _show(console, done)
    if as_json:
        print_json({"old": old, "new": new, "successors": [asdict(item) | {"may_follow": item.may_follow} for item in done]})
    raise typer.Exit(_status(done))


def _retrain(dependent: "Dependent", new: str, out: Path, console: "Console") -> Path:
    """Train a recipe on another base; what was begun is carried on with, what is finished is taken as it is."""
    quiet_transformers()
    from luthier.core.errors import TrainingError
    from luthier.train.run import resume, train
    from luthier.train.settings import settings_of_recipe

    if (out / "summary.json").is_file():
        return out
    if (out / "config.toml").is_file():
        outcome = resume(out, console=console)
    else:
        outcome = train(settings_of_recipe(dependent.recipe, model=new, out=str(out), places=dependent.data), console=console)
    if outcome.summary["ended"] == "interrupted":
        raise TrainingError(f"the training was interrupted; the same command carries on with {out}")
    return out


def _check_call(run: bool, suite: list[str], policy: Path | None, limit: int | None) -> None:
    if suite and not run:
        raise ConfigError("--suite would have no effect on a plan; give --run with it")
    if not suite and (policy or limit):
        raise ConfigError("--policy and --limit would have no effect without --suite")


def _judge(
    store: "Registry", named: list[str], policy: Path | None, limit: int | None, actor: str, run: dict[str, Any]
) -> "Judge":
    """Return what judges a successor against its predecessor, each on its own base, and keeps the decision.

    What the policy asks for and is not named is refused here, before anything is trained.
    """
    from luthier.cli.judging import check_suites, contestants, incumbent_on, judged, trained_on
    from luthier.cli.loading import load
    from luthier.cli.suites import named_suites
    from luthier.evaluate import DEFAULT_POLICY, read_policy
    from luthier.registry.columns import Verdict
    from luthier.registry.decisions import record_gate
    from luthier.registry.rebase import Judgement
    from luthier.registry.resolving import resolve

    asked = DEFAULT_POLICY if policy is None else read_policy(policy)
    suites = named_suites(named, limit)
    check_suites(suites, asked, has_incumbent=True)

    def judge(predecessor: str, successor: str) -> "Judgement":
        console = run["console"]
        old, new = resolve(store, predecessor), resolve(store, successor)
        left_out = trained_on(new, None, suites, console)
        candidate, base = contestants(new, load(None, str(new), dtype="auto", console=console), suites, remember=True, **run)
        incumbent = incumbent_on(old, load(None, str(old), dtype="auto", console=console), suites, name=predecessor, **run)
        report = judged(replace(candidate, adapter=successor), base, incumbent, asked, left_out)
        record_gate(store, successor, json_text(report.as_dict()).encode(), actor=actor)
        why = report.reasons[0] if report.reasons else f"policy '{asked.name}' against {predecessor}"
        return Judgement(Verdict(report.verdict), why)

    return judge


def _show_plan(console: "Console", plan: "Rebase", new: str) -> None:
    table = table_of("version", "base", "owner", "serves", "plan")
    for item in plan.dependents:
        step = item.obstacle or (f"moved already: {item.moved_to}" if item.moved_to else f"train its recipe on {new}")
        table.add_row(item.version, item.base, item.owner, ", ".join(item.serves), step)
    console.print(table)
    ready = sum(item.can_be_retrained for item in plan.dependents)
    console.print(f"{ready} of {len(plan.dependents)} can be trained again; do it with --run", highlight=False)


def _show(console: "Console", done: "list[Successor]") -> None:
    table = table_of("version", "successor", "may follow", "")
    for item in done:
        judged = item.judgement
        told = item.fault or (judged.reason if judged else "not judged; name what to judge by with --suite")
        word = "yes" if item.may_follow else "no" if item.fault or (judged and judged.verdict == "fail") else "undecided"
        table.add_row(item.predecessor, item.version or "-", word, told)
    console.print(table)


def _status(done: "list[Successor]") -> int:
    if any(item.fault or (item.judgement and item.judgement.verdict == "fail") for item in done):
        return FAILED
    return 0 if all(item.may_follow for item in done) else UNDECIDED


def _told(dependent: "Dependent") -> dict[str, Any]:
    return asdict(dependent) | {"can_be_retrained": dependent.can_be_retrained}
