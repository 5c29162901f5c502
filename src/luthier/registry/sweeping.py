"""sweep(): take away what killed writers and old versions left in the store: blobs that no row names, files half written.

Marked first, swept second: every blob is taken that no row names and that is older than the grace, which must be longer than an
upload lasts. Just before a blob goes it is looked at again under a lock that keeps out whoever is about to name one, so a
registration that brings the same bytes at this moment either comes first and keeps them, or stores them anew.
"""

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, select

from luthier.registry import audit
from luthier.registry.blobs import Stored
from luthier.registry.columns import BlobState, now
from luthier.registry.database import take_lock
from luthier.registry.keeping import digests_in_use
from luthier.registry.place import Registry
from luthier.registry.schema import Blob

GRACE = timedelta(hours=24)
BATCH = 200


@dataclass(frozen=True)
class Swept:
    """What was taken away, or would be."""

    blobs: tuple[Stored, ...]
    leftovers: tuple[Stored, ...]
    is_dry_run: bool

    @property
    def num_bytes(self) -> int:
        return sum(item.size for item in (*self.blobs, *self.leftovers))


def sweep(registry: Registry, *, actor: str, grace: timedelta = GRACE, dry_run: bool = False) -> Swept:
    """Remove blobs that nobody names and files that nobody finishes, where they are older than `grace`.

    Raises: BlobError if a store keeps versions of what was removed (all that came before is gone then).
    """
    limit = now() - grace
    with registry.database.reading() as session:
        used = digests_in_use(session)
        noted = select(Blob.digest).where(Blob.state == BlobState.PRESENT, Blob.created_at <= limit)
        unnamed = set(session.scalars(noted)) - used
    there = {blob.name: blob for blob in registry.blobs.stored()}
    orphans = [blob for blob in there.values() if blob.name not in used and blob.modified <= limit]
    leftovers = tuple(left for left in registry.blobs.leftovers() if left.modified <= limit)
    if dry_run:
        return Swept(tuple(orphans), leftovers, is_dry_run=True)
    swept: list[Stored] = []
    for start in range(0, len(orphans), BATCH):
        swept += _take(registry, orphans[start : start + BATCH], actor)
    if lost := sorted(unnamed - there.keys()):
        _forget(registry, lost)
    for left in leftovers:
        registry.blobs.remove_leftover(left)
    return Swept(tuple(swept), leftovers, is_dry_run=False)


def _take(registry: Registry, orphans: list[Stored], actor: str) -> list[Stored]:
    with registry.database.writing() as session:
        take_lock(session, "blobs")
        named = digests_in_use(session, [blob.name for blob in orphans])
        chosen = [blob for blob in orphans if blob.name not in named]
        noted = delete(Blob).where(Blob.state == BlobState.PRESENT)  # that one was erased stays noted
        session.execute(noted.where(Blob.digest.in_([blob.name for blob in chosen])))
        for blob in chosen:
            registry.blobs.delete(blob.name)
        if chosen:
            payload = {"num_blobs": len(chosen), "num_bytes": sum(blob.size for blob in chosen)}
            audit.record(session, actor, "store.sweep", "store", payload)
    return chosen


def _forget(registry: Registry, digests: list[str]) -> None:
    """Take away the rows of blobs that nobody names and the store does not have: a sweep died between the two."""
    with registry.database.writing() as session:
        take_lock(session, "blobs")
        gone = set(digests) - digests_in_use(session, digests)
        session.execute(delete(Blob).where(Blob.digest.in_([digest for digest in gone if registry.blobs.size(digest) is None])))
