"""`luthier registry erase ...`: a data set or a person's rows, all that learned from them, and the proof that they are gone."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, json_text, make_console, print_json
from luthier.cli.registry_data import SUBJECT_KEY, subject_key_of
from luthier.cli.registry_lineage import SUBJECT, versions_table
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, opened, table_of
from luthier.core.errors import ConfigError, RegistryError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.registry.erasing.reach import Target
    from luthier.registry.place import Registry

erase_app = typer.Typer(
    help="Erase a data set or a person's rows, with every version that learned from them, and prove it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
NUMBER = typer.Argument(help="The number of the erasure.")
DATASET = typer.Argument(None, metavar="DATASET[:VERSION]", help="A data set version.")


@erase_app.command("plan")
def dry_run(
    dataset: str | None = DATASET,
    subject: str | None = SUBJECT,
    subject_key: Path | None = SUBJECT_KEY,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """List everything that an erasure would reach. Changes nothing."""
    console = make_console(as_json)
    from luthier.registry.erasing.reach import plan

    store = opened(registry)
    target = _target(store, dataset, subject, subject_key)
    with store.database.reading() as session:
        found = plan(session, target)
    if as_json:
        print_json(found.as_dict())
        return
    console.print(f"Data: {', '.join(f'{one.name}:{one.version}' for one in found.data) or 'none'}", soft_wrap=True)
    if found.versions:
        console.print(versions_table(found.versions))
    for location, told in found.copies.items():
        console.print(f"{told['kind']}: {location}{'' if told['can_be_deleted'] else ' (external)'}", soft_wrap=True)
    console.print(f"{len(found.blobs):,} files in the store, {found.num_subject_rows:,} rows of the index of people")


@erase_app.command("note")
def note(
    name: str = typer.Argument(metavar="NAME:VERSION", help="A version of an adapter, or of a data set with --data."),
    location: str = typer.Argument(help="Where a copy of it lies: a folder, a file, or a URL."),
    kind: str = typer.Option(..., help="run, cache, tracker, export, merged or data."),
    data: bool = typer.Option(False, "--data", help="It is a data set."),
    registry: str | None = REGISTRY,
) -> None:
    """Note a copy outside of the registry, so that an erasure finds it."""
    from luthier.registry.copies import KINDS, note_copy
    from luthier.registry.datasets import find_version as find_data
    from luthier.registry.versions import find_version

    if kind not in KINDS:
        raise ConfigError(f"--kind is {kind!r}; needed one of {', '.join(KINDS)}")
    place = str(Path(location).absolute()) if "://" not in location else location
    with opened(registry).database.writing() as session:
        if data:
            note_copy(session, kind, place, data_id=find_data(session, name).id)
        else:
            note_copy(session, kind, place, version_id=find_version(session, name).id)


@erase_app.command("start")
def begin(
    dataset: str | None = DATASET,
    subject: str | None = SUBJECT,
    subject_key: Path | None = SUBJECT_KEY,
    reference: str | None = typer.Option(None, help="The number of the request elsewhere; no name."),
    due: datetime | None = typer.Option(None, formats=["%Y-%m-%d"], help="The day by which it has to be done."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Freeze the data, hold every affected version, and list what has to go. Nothing is deleted yet."""
    console = make_console(as_json)
    from luthier.registry.erasing.machine import start

    store = opened(registry)
    target = _target(store, dataset, subject, subject_key)
    due_at = due and due.replace(tzinfo=UTC)
    number = start(store, target, actor=caller(store, actor, "admin"), reference=reference, due_at=due_at, who=subject or "")
    _show(store, number, console, as_json)
    console.print(f"Decide on versions that are not simply erased, then: luthier registry erase resume {number}")


@erase_app.command("decide")
def decide(
    number: int = NUMBER,
    version: str = typer.Argument(metavar="NAME:VERSION", help="An affected version."),
    decision: str = typer.Argument(help="erase, retrain or exempt."),
    reason: str | None = typer.Option(None, help="Why it is exempt."),
    approver: str | None = typer.Option(None, help="Who approves of that; not the one who asks."),
    replacement: str | None = typer.Option(None, help="NAME:VERSION that was trained without the rows."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
) -> None:
    """Say what happens to an affected version; without a word it is erased."""
    from luthier.registry.erasing.items import Decision
    from luthier.registry.erasing.machine import decide as note

    if decision not in list(Decision):
        raise ConfigError(f"the decision is {decision!r}; needed one of {', '.join(Decision)}")
    words = {"reason": reason, "approver": approver, "replacement": replacement}
    store = opened(registry)
    note(store, number, version, Decision(decision), actor=caller(store, actor, "admin"), **words)


@erase_app.command("resume")
def go_on(
    number: int = NUMBER,
    assume_acknowledged: bool = typer.Option(False, help="Take it that servers let go: there is none that could say so."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Undeploy, delete and verify, from wherever it stopped. Deleted bytes do not come back."""
    console = make_console(as_json)
    from luthier.registry.erasing.machine import resume

    store = opened(registry)
    resume(store, number, actor=caller(store, actor, "admin"), assume_acknowledged=assume_acknowledged)
    _show(store, number, console, as_json)
    console.print(f"Sign it with: luthier registry erase certificate {number} --key FILE")


@erase_app.command("status")
def show_status(
    number: int | None = typer.Argument(None, help="The number of an erasure; all of them without it."),
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Show how far an erasure has come, or list all of them."""
    console = make_console(as_json)
    from luthier.registry.erasing.machine import all_requests

    store = opened(registry)
    if number is not None:
        _show(store, number, console, as_json)
        return
    with store.database.reading() as session:
        found = all_requests(session)
    if as_json:
        print_json({"erasures": found})
        return
    table = table_of("#erasure", "of a", "state", "reference", "due")
    for one in found:
        table.add_row(str(one["number"]), one["kind"], one["state"], one["reference"] or "", str(one["due_at"] or ""))
    console.print(table if found else "No erasures yet.")


@erase_app.command("certificate")
def certificate(
    number: int = NUMBER,
    key: Path | None = typer.Option(None, help="The private key (Ed25519, PEM) that signs it the first time."),
    out: Path | None = typer.Option(None, "--out", "-o", help="Write it to this file."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
) -> None:
    """Sign what a verified erasure did, and give the certificate out as JSON."""
    from luthier.core.atomic import write_atomic
    from luthier.registry.erasing.certificate import certify
    from luthier.registry.erasing.items import find_request
    from luthier.registry.signing import read_key

    store = opened(registry)
    with store.database.reading() as session:
        envelope = find_request(session, number).certificate
    if not envelope:
        if key is None:
            raise ConfigError("name the key that signs with --key")
        envelope = certify(store, number, read_key(key), actor=caller(store, actor, "admin"))
    if out is None:
        print_json(envelope)
    else:
        write_atomic(out, json_text(envelope))


@erase_app.command("verify-certificate")
def verify_certificate(
    file: Path = typer.Argument(help="A certificate."),
    trust: Path = typer.Option(..., help="Folder with the public keys (*.pub) that are trusted."),
    registry: str | None = REGISTRY,
    alone: bool = typer.Option(False, help="Look at the signature only, not at the registry."),
    as_json: bool = JSON,
) -> None:
    """Check the signature of a certificate, and that the registry still looks as it says."""
    console = make_console(as_json)
    from luthier.registry.erasing.certificate import check_certificate, read_certificate
    from luthier.registry.signing import trusted_keys

    try:
        envelope = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RegistryError(f"{file} cannot be read as a certificate: {error}") from error
    payload = read_certificate(envelope, trusted_keys(trust))
    faults = [] if alone else check_certificate(opened(registry), payload)
    if as_json:
        print_json({"certificate": payload, "faults": faults})
    else:
        console.print(f"Erasure {payload['erasure']} was certified by {payload['certified_by']} at {payload['certified_at']}.")
        for one in payload["not_deleted"]:
            console.print(f"not deleted: {one['what']} ({one['why']})", soft_wrap=True)
        for fault in faults:
            console.print(f"not as certified: {fault}", soft_wrap=True)
    if faults:
        raise typer.Exit(1)


def _target(store: "Registry", dataset: str | None, subject: str | None, subject_key: Path | None) -> "Target":
    from luthier.registry.datasets import check_key, find_version
    from luthier.registry.erasing.reach import Target

    if (dataset is None) == (subject is None):
        raise ConfigError("name a data set version, or a person with --subject")
    with store.database.reading() as session:
        if dataset is not None:
            return Target("dataset", find_version(session, dataset).digest)
        key = subject_key_of(subject_key)
        check_key(session, key)
        return Target("subject", key.hmac(subject).hex())


def _show(store: "Registry", number: int, console: "Console", as_json: bool) -> None:
    from luthier.registry.erasing.machine import status

    with store.database.reading() as session:
        told: dict[str, Any] = status(session, number)
    if as_json:
        print_json(told)
        return
    console.print(f"Erasure {number} is {told['state']}.")
    table = table_of("what", "", "decision", "state")
    for item in told["items"]:
        table.add_row(item["kind"], item["target"], item["decision"] or "", item["state"])
    console.print(table)
