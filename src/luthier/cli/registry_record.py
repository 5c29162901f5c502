"""`luthier registry audit | keygen | sign | diff`: what was done, who vouches for what, and what changed between versions."""

from pathlib import Path

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, VERSION, caller, opened, table_of
from luthier.cli.registry_serving import moment_of
from luthier.core.errors import ConfigError


def audit(
    by: str | None = typer.Option(None, help="Only what this person or program did."),
    action: str | None = typer.Option(None, help="Only this: surface.promote, or all of surface."),
    subject: str | None = typer.Option(None, help="Only on this: adapter/orders/3, or all of adapter/orders."),
    since: str | None = typer.Option(None, metavar="TIME", help="From this moment on."),
    until: str | None = typer.Option(None, metavar="TIME", help="Before this moment."),
    limit: int | None = typer.Option(None, min=1, help="Only the last ones."),
    verify: bool = typer.Option(False, "--verify", help="Check the whole chain. Exit status: 0 it holds, 1 it is broken."),
    head: str | None = typer.Option(None, help="With --verify: a hash noted earlier, which the chain must hold."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show the audit chain: who did what, when, to what."""
    console = make_console(as_json)
    from luthier.registry.audit import check_chain, events

    if head and not verify:
        raise ConfigError("--head has no effect without --verify")
    store = opened(registry)
    if verify:
        if any((by, action, subject, since, until, limit)):
            raise ConfigError("--verify checks the whole chain; leave the filters out")
        with store.database.reading() as session:
            report = check_chain(session, head=head)
        if as_json:
            faults = [{"event": fault.event_id, "fault": fault.what} for fault in report.faults]
            print_json({"events": report.num_events, "head": report.head, "faults": faults})
        else:
            for fault in report.faults:
                console.print(f"event {fault.event_id} {fault.what}", style="red", soft_wrap=True)
            console.print(f"{report.num_events} events, {'BROKEN' if report.faults else 'unbroken'}; the last is {report.head}")
        raise typer.Exit(bool(report.faults))
    with store.database.reading() as session:
        found = events(
            session,
            actor=by,
            action=action,
            subject=subject,
            since=moment_of(since) if since else None,
            until=moment_of(until) if until else None,
            limit=limit,
        )
    if as_json:
        fields = ("id", "created_at", "actor", "action", "subject", "payload", "previous_hash", "hash")
        print_json({"events": [{field: getattr(event, field) for field in fields} for event in found]})
        return
    table = table_of("#event", "when", "who", "did", "to", "told")
    for event in found:
        told = ", ".join(f"{key}={value}" for key, value in event.payload.items() if value not in (None, [], {}))
        table.add_row(str(event.id), f"{event.created_at:%Y-%m-%d %H:%M:%S}", event.actor, event.action, event.subject, told)
    console.print(table if found else "No such event.")


def keygen(
    path: Path = typer.Argument(help="File for the private key; the public one gets .pub behind its name."),
    as_json: bool = JSON,
) -> None:
    """Make an Ed25519 key to sign with. Give its public half to those who are to trust it."""
    console = make_console(as_json)
    from luthier.registry.signing import make_key, public_path

    name = make_key(path)
    if as_json:
        print_json({"key": name, "private": str(path), "public": str(public_path(path))})
        return
    console.print(f"{path} (keep it), {public_path(path)} (give it away): key {name}", highlight=False, soft_wrap=True)


def sign(
    version: str = VERSION,
    key: Path = typer.Option(..., help="The private key's file."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Sign a version: the digest of its manifest, which names every file."""
    console = make_console(as_json)
    from luthier.registry.seals import seal
    from luthier.registry.signing import read_key
    from luthier.registry.versions import find_version, name_of

    private = read_key(key)
    store = opened(registry)
    who = caller(store, actor, "register")
    with store.database.writing() as session:
        chosen = find_version(session, version)
        envelope = seal(session, chosen, private, actor=who)
        name = name_of(chosen)
    signer = envelope["signatures"][0]["keyid"]
    print_json({"version": name, "envelope": envelope}) if as_json else console.print(
        f"{name} is signed by {signer}", soft_wrap=True
    )


def diff(
    before: str = VERSION,
    after: str = VERSION,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show what differs between two versions: configuration, base, data, recipe, metrics, files."""
    console = make_console(as_json)
    from luthier.registry.differences import diff_as_dict
    from luthier.registry.versions import find_version

    with opened(registry).database.reading() as session:
        told = diff_as_dict(session, find_version(session, before), find_version(session, after))
    if as_json:
        print_json(told)
        return
    table = table_of("part", "what", told["before"], told["after"])
    for part, changes in told["differences"].items():
        for what, change in changes.items():
            table.add_row(part, what, *("-" if value is None else str(value) for value in (change["before"], change["after"])))
    console.print(table if told["differences"] else f"{told['before']} and {told['after']} do not differ.")
