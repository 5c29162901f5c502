"""The rows of blobs: a blob is noted in the transaction of the row that will name it, after its bytes were stored.

Between the two a sweeper may run, and an erasure. So whoever notes a blob holds the lock `blobs` together with all who do the
same, looks whether the bytes are still there, and tries again if not; the sweeper holds that lock alone.
"""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import BlobError, RefusedError
from luthier.registry.blobs import BlobStore
from luthier.registry.columns import BlobState, Row, now
from luthier.registry.database import add_if_absent, take_lock
from luthier.registry.schema import Blob


class BlobVanishedError(BlobError):
    """The sweeper took a blob that was nobody's at that moment; storing it again helps."""


def keep_blob(session: Session, blobs: BlobStore, digest: str, size: int) -> None:
    """Note that a stored blob is in use. Raises: RefusedError if it is being erased, BlobVanishedError if it is gone again."""
    take_lock(session, "blobs", shared=True)
    if blobs.size(digest) != size:
        raise BlobVanishedError(f"Blob {digest} is not in {blobs.place} any more; store it again.")
    if add_if_absent(session, Blob, digest=digest, size=size, state=BlobState.PRESENT, created_at=now()):
        return
    row = session.scalars(select(Blob).filter_by(digest=digest).with_for_update()).one()
    if row.state is BlobState.DELETING:
        raise RefusedError(f"Blob {digest} is being erased at this moment. Finish the erasure first.")
    row.state = BlobState.PRESENT


def referring_columns() -> list[Any]:
    """Return every column that points to a blob: what none of them names is nobody's."""
    return [
        column
        for table in Row.metadata.sorted_tables
        for column in table.columns
        if any(key.column is Blob.__table__.c.digest for key in column.foreign_keys)
    ]


def digests_in_use(session: Session, among: Iterable[str] | None = None) -> set[str]:
    """Return the digests that some row names, of all blobs or of some."""
    used: set[str] = set()
    chosen = None if among is None else list(among)
    for column in referring_columns():
        query = select(column).where(column.is_not(None)).distinct()
        used.update(session.scalars(query if chosen is None else query.where(column.in_(chosen))))
    return used
