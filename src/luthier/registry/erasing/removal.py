"""Deleting bytes: blobs that nothing which stays needs, copies on this machine, and what the database's files still hold."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError
from luthier.registry.columns import BlobState, Lifecycle
from luthier.registry.database import take_lock
from luthier.registry.erasing.items import items, put
from luthier.registry.erasing.reach import local_path
from luthier.registry.place import Registry
from luthier.registry.schema import (
    Adapter,
    AdapterFile,
    AdapterVersion,
    Alias,
    Approval,
    Blob,
    CopyElsewhere,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    ErasureItem,
    EvalRun,
    GateDecision,
)


def remove(registry: Registry, number: int) -> None:
    """Delete the blobs and copies of an erasure that are not deleted yet. Raises: BlobError for a blob that cannot be."""
    with registry.database.reading() as session:
        blobs = [item.target for item in items(session, number, "blob") if item.state == "open"]
        copies = [item.target for item in items(session, number, "copy") if item.state == "open"]
    for digest in blobs:
        _remove_blob(registry, number, digest)
    for location in copies:
        with registry.database.reading() as session:
            why = _why_not(session, registry, location)
        path = local_path(location)
        if path is not None and why is None:
            _remove_tree(path)
        with registry.database.writing() as session:
            item = put(session, number, "copy", location, {})
            item.state = "done" if why is None else "external"
            item.evidence = item.evidence | {"why": why}
    if registry.cache.exists():
        _remove_tree(registry.cache)


def _remove_blob(registry: Registry, number: int, digest: str) -> None:
    with registry.database.writing() as session:
        take_lock(session, "blobs")
        is_needed = digest not in unneeded(session, [digest])
        if is_needed:
            put(session, number, "blob", digest, {}).state = "kept"
        elif blob := session.get(Blob, digest):
            blob.state = BlobState.DELETING
    if is_needed:
        return
    registry.blobs.delete(digest)
    with registry.database.writing() as session:
        if blob := session.get(Blob, digest):
            blob.state = BlobState.GONE
        put(session, number, "blob", digest, {}).state = "done"


def unneeded(session: Session, digests: Iterable[str]) -> set[str]:
    """Return those of the digests that nothing which stays names."""
    asked = set(digests)
    gates = select(GateDecision.report_digest).join(AdapterVersion, AdapterVersion.id == GateDecision.version_id)
    return asked.difference(
        session.scalars(select(AdapterFile.blob_digest).where(AdapterFile.blob_digest.in_(asked))),
        session.scalars(select(EvalRun.scores_digest).where(EvalRun.scores_digest.in_(asked))),
        session.scalars(gates.where(GateDecision.report_digest.in_(asked), AdapterVersion.lifecycle != Lifecycle.ERASED)),
    )


def _why_not(session: Session, registry: Registry, location: str) -> str | None:
    """Why a copy cannot be deleted from here, None if it can."""
    path = local_path(location)
    if path is None:
        return "external, needs acknowledgement"
    real = path.resolve()
    database = registry.database.url.database if registry.database.is_sqlite else None
    own = [Path.home(), local_path(registry.blobs.place), database and Path(database)]
    if any(kept.resolve().is_relative_to(real) for kept in own if kept):
        return "not deleted: it holds the registry or a home folder; delete by hand what is in it"
    others = [*session.scalars(select(CopyElsewhere.location))]
    others += session.scalars(select(DatasetVersion.location).where(DatasetVersion.location.is_not(None)))
    for other in others:
        if (kept := local_path(str(other))) and (kept.resolve().is_relative_to(real) or real.is_relative_to(kept.resolve())):
            return f"not deleted: {other} stays, and one is in the other"
    return None


def _remove_tree(path: Path) -> None:
    real = path.resolve()
    for one in {path, real}:
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink(missing_ok=True)


def compact(registry: Registry) -> None:
    """Rewrite the database so that no page and no log holds what was deleted. Raises: RefusedError if somebody is reading."""
    if not registry.database.is_sqlite:
        with registry.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in _tables():
                connection.execute(text(f"VACUUM (FULL) {table}"))
        return
    raw = registry.database.engine.raw_connection()
    try:
        cursor = raw.cursor()
        cursor.execute("VACUUM")
        is_busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    finally:
        raw.close()
    if is_busy:
        raise RefusedError("Somebody is reading the registry, so its log cannot be emptied yet. Resume the erasure later.")


def _tables() -> list[str]:
    """The tables from which an erasure takes something."""
    versions = (Adapter, AdapterVersion, AdapterFile, Alias, Approval, Deployment, EvalRun, ErasureItem)
    return [one.__tablename__ for one in (*versions, DatasetVersion, DatasetSubject, CopyElsewhere)]
