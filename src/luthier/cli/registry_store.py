"""`luthier registry verify | gc | doctor`: are the stored bytes sound, and do rows and store agree?"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import typer

from luthier.cli.output import JSON, make_console, print_json, report_error
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, fingerprint_of_base, opened, table_of
from luthier.core.errors import ConfigError, LuthierError

UNREADABLE = 2
FOUND = 1


def verify(
    reference: str | None = typer.Argument(None, metavar="NAME[:VERSION|:ALIAS]", help="A version. Default: all stored bytes."),
    level: str = typer.Option("sha256", help="size: every file is there at its length; sha256: every byte is hashed."),
    base: str | None = typer.Option(None, help="Base model at hand: is it the one that the version was trained on?"),
    trusted: Path | None = typer.Option(None, help="Folder of public keys (*.pub): did one of them sign the version?"),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Verify what is stored. Exit status: 0 sound, 1 something failed, 2 could not be read, 3 inconclusive."""
    console = make_console(as_json)
    from luthier.registry.seals import sealed_by
    from luthier.registry.signing import trusted_keys
    from luthier.registry.verifying import Level, verify_store
    from luthier.registry.verifying import verify as verify_version

    if level not in list(Level):
        raise ConfigError(f"--level is {level!r}; needed one of {', '.join(Level)}")
    if base is not None and reference is None:
        raise ConfigError("--base has no effect without a version; name one.")
    if trusted is not None and reference is None:
        raise ConfigError("--trusted has no effect without a version; name one.")
    try:
        store = opened(registry)
        check_seal = sealed_by(trusted_keys(trusted)) if trusted else None
        fingerprint = fingerprint_of_base(base, console) if base else None
        if reference is None:
            report = verify_store(store, level=Level(level))
        else:
            report = verify_version(store, reference, level=Level(level), base=fingerprint, check_seal=check_seal)
    except LuthierError as error:
        report_error(error, as_json=as_json)
        raise typer.Exit(UNREADABLE) from error
    if as_json:
        print_json(report.as_dict())
    else:
        table = table_of("check", "result", "")
        for check in report.checks:
            table.add_row(check.name, check.status.value, check.told)
        console.print(table)
        console.print(f"{report.subject}: {report.status.value}", highlight=False)
    raise typer.Exit(report.exit_code)


def gc(
    grace_hours: float = typer.Option(24.0, min=0, help="Leave what is younger; longer than the longest upload."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Only tell what would be removed."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Remove stored bytes that no version names, and what killed writers left unfinished."""
    console = make_console(as_json)
    from luthier.registry.sweeping import sweep

    store = opened(registry)
    who = "" if dry_run else caller(store, actor, "admin")
    done = sweep(store, actor=who, grace=timedelta(hours=grace_hours), dry_run=dry_run)
    verb = "would remove" if done.is_dry_run else "removed"
    console.print(f"{verb} {len(done.blobs)} blobs and {len(done.leftovers)} unfinished files, {done.num_bytes / 1e6:,.1f} MB")
    if as_json:
        told: dict[str, Any] = {"is_dry_run": done.is_dry_run, "bytes": done.num_bytes}
        print_json(told | {"blobs": [item.name for item in done.blobs], "unfinished": [item.name for item in done.leftovers]})


def doctor(registry: str | None = REGISTRY, as_json: bool = JSON) -> None:
    """Look for what should never be there: rows without bytes, half versions, gaps, a broken record. Exit status: 0 or 1."""
    console = make_console(as_json)
    from luthier.registry.doctor import examine_registry

    store = opened(registry)
    findings = examine_registry(store)
    if as_json:
        told = [{"kind": item.kind, "subject": item.subject, "told": item.told, "is_litter": item.is_litter} for item in findings]
        print_json({"registry": store.place, "is_clean": not findings, "findings": told})
    elif findings:
        table = table_of("finding", "where", "")
        for item in findings:
            table.add_row(item.kind, item.subject, item.told)
        console.print(table)
    else:
        console.print(f"{store.place} is clean")
    raise typer.Exit(FOUND if findings else 0)
