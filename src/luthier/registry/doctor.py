"""examine_registry(): do the rows, the store and the record agree? Finds what should never be there; changes nothing.

What a killed writer leaves in the store (a blob that nobody names, a file half written) is told apart from a fault: `gc`
removes it. Everything else needs a person.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.formats.note import CONFIG_FILE, TENSOR_FILE
from luthier.registry.audit import check_chain
from luthier.registry.columns import BlobState, Lifecycle
from luthier.registry.keeping import digests_in_use
from luthier.registry.manifest import FileEntry, digest_of, manifest_of
from luthier.registry.place import Registry
from luthier.registry.schema import Adapter, AdapterVersion, Alias, Blob, Dataset, DatasetVersion
from luthier.registry.schema_serving import Tenant, UsageEvent, UsageTotal
from luthier.registry.versions import name_of


@dataclass(frozen=True)
class Finding:
    """Something that should not be. `is_litter`: nothing is wrong, and `gc` takes it away."""

    kind: str
    subject: str
    told: str
    is_litter: bool = False


def examine_registry(registry: Registry) -> list[Finding]:
    """Return everything that is not as it should be, faults first. Reads all rows, and the store's list but no bytes."""
    with registry.database.reading() as session:
        faults = [
            *_dangling_blobs(session, registry),
            *_half_versions(session),
            *_gaps(session),
            *_wrong_aliases(session),
            *_broken_record(session),
            *_wrong_sums(session),
            *_broken_file(session),
        ]
        used = digests_in_use(session)
    litter = [
        Finding("orphan", blob.name, f"nobody names this blob of {blob.size:,} bytes; gc removes it", is_litter=True)
        for blob in registry.blobs.stored()
        if blob.name not in used
    ]
    litter += [
        Finding("unfinished", left.name, f"{left.size:,} bytes of a writer that died, or is at it; gc removes it", is_litter=True)
        for left in registry.blobs.leftovers()
    ]
    return faults + litter


def _dangling_blobs(session: Session, registry: Registry) -> Iterator[Finding]:
    rows = session.scalars(select(Blob).order_by(Blob.digest)).all()  # before the store is listed: blobs come before rows
    sizes = {blob.name: blob.size for blob in registry.blobs.stored()}
    for blob in rows:
        there = sizes.get(blob.digest)
        if blob.state is BlobState.PRESENT and there is None:
            yield Finding("dangling", blob.digest, "its row says that it is there, the store does not have it; restore it")
        elif blob.state is BlobState.PRESENT and there != blob.size:
            yield Finding("dangling", blob.digest, f"has {there:,} bytes in the store, {blob.size:,} in its row; restore it")
        elif blob.state is BlobState.GONE and there is not None:
            yield Finding("not gone", blob.digest, "its row says that it was erased, the store still has it; erase it again")
        elif blob.state is BlobState.DELETING:
            yield Finding("deleting", blob.digest, "an erasure has begun and not ended; resume it")


def _half_versions(session: Session) -> Iterator[Finding]:
    states = {blob.digest: blob.state for blob in session.scalars(select(Blob))}
    for version in session.scalars(select(AdapterVersion).where(AdapterVersion.lifecycle != Lifecycle.ERASED)):
        files = [FileEntry(file.path, file.size, file.blob_digest) for file in version.files]
        gone = [file.path for file in files if states[file.sha256] is not BlobState.PRESENT]
        if missing := {CONFIG_FILE, TENSOR_FILE} - {file.path for file in files}:
            yield Finding("half version", name_of(version), f"has no {' and no '.join(sorted(missing))}")
        elif digest_of(manifest_of(files)) != version.manifest_digest:
            yield Finding("half version", name_of(version), "its files are not those of its manifest")
        elif gone:
            yield Finding("half version", name_of(version), f"is not erased, but these files are: {', '.join(gone)}")


def _gaps(session: Session) -> Iterator[Finding]:
    lines: tuple[tuple[str, Any, Any, Any], ...] = (
        ("adapter", Adapter, AdapterVersion, AdapterVersion.adapter_id),
        ("data set", Dataset, DatasetVersion, DatasetVersion.dataset_id),
    )
    for kind, owner, version, owner_id in lines:
        counted = select(owner_id, func.count(), func.min(version.version), func.max(version.version)).group_by(owner_id)
        found = {row[0]: tuple(row)[1:] for row in session.execute(counted)}
        for line in session.scalars(select(owner).order_by(owner.name)):
            count, first, last = found.get(line.id, (0, 1, 0))
            if (first, last) != (1, count) or line.next_version != last + 1:
                told = f"has {count} versions from {first} to {last}, and its next is {line.next_version}"
                yield Finding("gap", line.name, f"{kind} {told}: rows were taken out by hand")


def _wrong_aliases(session: Session) -> Iterator[Finding]:
    query = select(Alias, AdapterVersion).join(AdapterVersion).where(Alias.adapter_id != AdapterVersion.adapter_id)
    for alias, version in session.execute(query):
        yield Finding("alias", alias.name, f"names a version of another adapter: {name_of(version)}")


def _broken_record(session: Session) -> Iterator[Finding]:
    for fault in check_chain(session).faults:
        yield Finding("audit", f"event {fault.event_id}", fault.what)


def _wrong_sums(session: Session) -> Iterator[Finding]:
    """Usage that was counted twice, or not: the sums of a tenant's days against its events."""

    def sums(table: Any, requests: Any) -> dict[int, tuple[int, ...]]:
        tokens = (func.sum(table.prompt_tokens), func.sum(table.cached_tokens), func.sum(table.completion_tokens))
        query = select(table.tenant_id, requests, *tokens).group_by(table.tenant_id)
        return {tenant_id: tuple(map(int, counts)) for tenant_id, *counts in session.execute(query)}

    told, counted = sums(UsageTotal, func.sum(UsageTotal.requests)), sums(UsageEvent, func.count())
    for tenant in session.scalars(select(Tenant).order_by(Tenant.name)):
        here, there = told.get(tenant.id, (0, 0, 0, 0)), counted.get(tenant.id, (0, 0, 0, 0))
        if here != there:
            what = "requests, tokens of prompts, of them cached, and of answers"
            yield Finding("usage", tenant.name, f"the sums of its days are {here} ({what}), its events make {there}")


def _broken_file(session: Session) -> Iterator[Finding]:
    """SQLite's own word on its file."""
    if session.get_bind().dialect.name != "sqlite":
        return
    connection = session.connection()
    for (told,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if told != "ok":
            yield Finding("file", "database", told)
    for table, row, target, _ in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield Finding("file", f"{table} {row}", f"points to a row of {target} that is not there")
