"""`luthier registry gate | scores | promote | rollback | retire | production`: what may go out, and what is out."""

import json
from datetime import UTC, datetime
from pathlib import Path

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, VERSION, caller, opened, table_of
from luthier.cli.registry_surfaces import audience_of
from luthier.core.errors import ConfigError, RegistryError

EXPECT = typer.Option(
    None, metavar="NAME:VERSION", help="What you believe to serve now ('none': nothing); refused if it is not so."
)
BASE = typer.Option(None, help="Fingerprint digest of the base it was judged on. Default: the one it was trained on.")
TRUSTED = typer.Option(None, help="Folder of the trusted public keys (*.pub). Default: LUTHIER_TRUSTED_KEYS.")
NOTHING = "none"


def gate(
    version: str = VERSION,
    report: Path = typer.Argument(help="The gate's report (JSON)."),
    base: str | None = BASE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Keep the gate's report on a version; its newest verdict decides what may be promoted."""
    console = make_console(as_json)
    from luthier.registry.decisions import record_gate

    store = opened(registry)
    decision = record_gate(store, version, _read(report), actor=caller(store, actor, "register"), base=base)
    told = {"version": version, "verdict": decision.verdict, "policy": decision.policy, "report": decision.report_digest}
    print_json(told) if as_json else console.print(f"{version}: {decision.verdict} under {decision.policy}")


def scores(
    version: str = VERSION,
    file: Path = typer.Argument(help="Scores on one suite (JSON), as luthier eval writes them."),
    base: str | None = BASE,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Keep a version's scores on a suite, item by item."""
    console = make_console(as_json)
    from luthier.registry.decisions import record_eval

    try:
        found = json.loads(_read(file))
    except ValueError as error:
        raise RegistryError(f"{file} is not JSON: {error}") from error
    store = opened(registry)
    run = record_eval(store, version, found, actor=caller(store, actor, "register"), base=base)
    told = {"version": version, "suite": run.suite, "metrics": run.metrics, "scores": run.scores_digest}
    print_json(told) if as_json else console.print(f"{version}: {run.suite} {run.metrics}", highlight=False)


def promote(
    version: str = VERSION,
    surface: str = typer.Option(..., "--surface", "-s", help="Where it is to serve."),
    expect: str | None = EXPECT,
    force: str | None = typer.Option(None, metavar="REASON", help="Overrule gate, approvals and base; the reason stays visible."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only tell what is not met. Exit status: 0 nothing, 1 something."),
    trusted: Path | None = TRUSTED,
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Let a version serve a surface, if every rule is met; a refusal lists all that are not."""
    console = make_console(as_json)
    from luthier.registry.promotion import findings_of
    from luthier.registry.promotion import promote as go
    from luthier.registry.signing import default_trusted, trusted_keys

    store, keys = opened(registry), trusted_keys(trusted or default_trusted())
    if dry_run:
        found = findings_of(store, version, surface, expected_current=_expected(expect), keys=keys)
        if as_json:
            unmet = [{"rule": one.rule, "what": one.what, "can_be_forced": one.can_be_forced} for one in found.unmet]
            print_json({"version": version, "surface": surface, "unmet": unmet, "warnings": list(found.warnings)})
        else:
            for one in found.unmet:
                console.print(f"{one.rule}: {one.what}", highlight=False, soft_wrap=True)
            console.print(f"{len(found.unmet)} not met" if found.unmet else "every rule is met")
        raise typer.Exit(bool(found.unmet))
    who = caller(store, actor, "promote")
    change = go(store, version, surface, actor=who, expected_current=_expected(expect), force_reason=force, keys=keys)
    if as_json:
        print_json(change.as_dict())
        return
    console.print(f"{change.version} serves {surface} (before: {change.before or 'nothing'})")
    for text in (*change.warnings, *(f"overruled: {what}" for what in change.overruled)):
        console.print(text, style="yellow", soft_wrap=True)


def rollback(
    surface: str = typer.Argument(help="The surface that is to go back."),
    to: str | None = typer.Option(None, metavar="NAME:VERSION", help="A version that served it, or passed the gate once."),
    expect: str | None = EXPECT,
    reason: str = typer.Option("", help="Why; the audit chain keeps its digest."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Let what served a surface before serve it again, at once."""
    console = make_console(as_json)
    from luthier.registry.promotion import rollback as go

    store = opened(registry)
    who = caller(store, actor, "promote")
    change = go(store, surface, actor=who, to=to, expected_current=_expected(expect), reason=reason)
    print_json(change.as_dict()) if as_json else console.print(
        f"{change.version} serves {surface} again (before: {change.before})"
    )


def retire(
    version: str = VERSION,
    drain: bool = typer.Option(False, "--drain", help="End what it serves; its surfaces then serve nothing (or the control)."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Take a version out of use for good; its bytes stay."""
    console = make_console(as_json)
    from luthier.registry.retirement import retire as go
    from luthier.registry.versions import find_version, name_of

    store = opened(registry)
    who = caller(store, actor, "promote")
    with store.database.writing() as session:
        chosen = find_version(session, version)
        drained = go(session, chosen, actor=who, drain=drain)
        name = name_of(chosen)
    told = f" (no longer on {', '.join(drained)})" if drained else ""
    print_json({"version": name, "drained": drained}) if as_json else console.print(f"{name} is retired{told}")


def production(
    audience: str | None = typer.Option(None, help="customer, internal or batch."),
    surface: str | None = typer.Option(None, help="One surface."),
    adapter: str | None = typer.Option(None, help="One adapter."),
    as_of: str | None = typer.Option(None, metavar="TIME", help="At this moment (2026-11-24T09:30, UTC unless a zone is given)."),
    history: bool = typer.Option(False, "--history", help="All that has served the surface, oldest first."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """List the versions that serve, now or at a moment, from what was deployed; a label says nothing here."""
    console = make_console(as_json)
    from luthier.registry.production import history as served_by
    from luthier.registry.production import in_production
    from luthier.registry.surfaces import find_surface

    if history and (surface is None or audience or adapter or as_of):
        raise ConfigError("--history takes --surface and nothing else")
    with opened(registry).database.reading() as session:
        if surface is not None:
            find_surface(session, surface)
        moment, chosen = as_of and moment_of(as_of), audience and audience_of(audience)
        if history:
            served = served_by(session, str(surface))
        else:
            served = in_production(session, audience=chosen or None, surface=surface, adapter=adapter, as_of=moment or None)
    if as_json:
        print_json({"as_of": as_of, "served": [one.as_dict() for one in served]})
        return
    table = table_of("surface", "audience", "version", "#share", "base", "owner", "since", "remarks")
    for one in served:
        remarks = [f"forced: {one.forced_reason}"] if one.forced_reason else []
        remarks += [f"HELD: {one.hold_reason}"] if one.hold_reason else []
        remarks += [f"experiment {one.experiment}"] if one.experiment else []
        remarks += [f"until {one.ended_at:%Y-%m-%d %H:%M}"] if one.ended_at else []
        table.add_row(
            one.surface,
            one.audience,
            f"{one.name}:{one.version}",
            f"{one.weight_bp / 100:g} %",
            one.base or "unknown",
            one.owner,
            f"{one.started_at:%Y-%m-%d %H:%M}",
            ", ".join(remarks),
        )
    console.print(table if served else "Nothing is in production there.")


def moment_of(text: str) -> datetime:
    """Return a moment from its ISO form, in UTC where no zone is given. Raises: ConfigError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"{text!r} is no moment; needed something like 2026-11-24 or 2026-11-24T09:30") from error
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _expected(expect: str | None) -> str | None:
    from luthier.registry.promotion import ANY

    return ANY if expect is None else None if expect == NOTHING else expect


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RegistryError(f"cannot read {path}: {error.strerror}") from error
