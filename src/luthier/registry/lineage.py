"""What came of what: questions about versions and data as single statements, the same on SQLite and PostgreSQL.

    data set version --made of--> data set version          datasets: filtered, mixed
            | learned from
    adapter version --made of--> adapter version            continued, composed, merged, distilled
            | serves
        surface

Every walk is a recursive common table expression with UNION, which forgets what it has seen, so a circle in the rows ends it
too. A walk costs what it finds: each step goes by an index from a row to its neighbours.

Data is what its content is: a version stands for all that have its digest. A person's rows are followed into what was made of
the data they are in, until a content with an index of people of its own, which answers for itself.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import CTE, Select, exists, select
from sqlalchemy.orm import Session, aliased

from luthier.registry.columns import Audience, DataState, Lifecycle
from luthier.registry.database import walking
from luthier.registry.schema import (
    Adapter,
    AdapterDataset,
    AdapterParent,
    AdapterVersion,
    Dataset,
    DatasetParent,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    Surface,
)


@dataclass(frozen=True)
class Serving:
    """Where a version answers now, and with which share."""

    surface: str
    audience: Audience
    weight_bp: int


@dataclass(frozen=True)
class Found:
    """A version that a question found. `is_direct`: it learned from the data itself, else a parent of it did."""

    id: int
    name: str
    version: int
    manifest_digest: str
    lifecycle: Lifecycle
    hold_reason: str | None
    is_direct: bool
    serving: tuple[Serving, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class FoundData:
    """A data set version that a question found."""

    id: int
    name: str
    version: int
    digest: str
    state: DataState


def holding_person(session: Session, subject_hmac: bytes) -> list[FoundData]:
    """Return every data set version that holds or may hold a person's rows."""
    return _data(session, _data_with(subject_hmac))


def made_of_data(session: Session, ids: Iterable[int]) -> list[FoundData]:
    """Return data set versions with these ids, whatever has the same content, and all that was made of them."""
    return _data(session, _data_from(list(ids)))


def trained_on(session: Session, ids: Iterable[int]) -> list[Found]:
    """Return every version that learned from these data set versions, or from what was made of them, itself or by a parent."""
    return _learned(session, _data_from(list(ids)))


def trained_on_person(session: Session, subject_hmac: bytes) -> list[Found]:
    """Return every version that learned from data that holds or may hold a person's rows, itself or by a parent."""
    return _learned(session, _data_with(subject_hmac))


def descendants(session: Session, ids: Iterable[int]) -> list[Found]:
    """Return all versions that were made of these, and of those; not these themselves."""
    start = list(ids)
    family = _walk(select(AdapterVersion.id).where(AdapterVersion.id.in_(start)), AdapterParent.parent_id, AdapterParent.child_id)
    with walking(session):
        return _versions(session, select(family.c.id).where(family.c.id.not_in(start)), set())


def ancestors(session: Session, version_id: int) -> list[Found]:
    """Return all versions that this one was made of; `is_direct` says which are its own parents."""
    family = _family(version_id)
    with walking(session):
        parents = set(session.scalars(select(AdapterParent.parent_id).where(AdapterParent.child_id == version_id)))
        return _versions(session, select(family.c.id).where(family.c.id != version_id), parents)


def data_seen(session: Session, version_id: int) -> list[FoundData]:
    """Return the data that a version learned from, itself or by its parents, and what that data was made of."""
    family = _family(version_id)
    read = select(AdapterDataset.dataset_version_id).join(family, family.c.id == AdapterDataset.version_id)
    return _data(session, _walk(read, DatasetParent.child_id, DatasetParent.parent_id))


def _walk(start: Select[Any], here: Any, there: Any) -> CTE:
    """The ids of `start` and all that is reached from them by the edges `here` -> `there` of one table."""
    seen = start.with_only_columns(start.selected_columns[0].label("id")).cte(recursive=True)
    return seen.union(select(there).join(seen, here == seen.c.id))


def _family(version_id: int) -> CTE:
    """A version and all that it was made of."""
    one = select(AdapterVersion.id).where(AdapterVersion.id == version_id)
    return _walk(one, AdapterParent.child_id, AdapterParent.parent_id)


def _data_from(ids: list[int]) -> CTE:
    same = select(DatasetVersion.digest).where(DatasetVersion.id.in_(ids))
    seen = select(DatasetVersion.id).where(DatasetVersion.digest.in_(same)).cte(recursive=True)
    return seen.union(_made_of(seen))


def _data_with(subject_hmac: bytes) -> CTE:
    holds = select(DatasetVersion.digest).join(DatasetSubject, DatasetSubject.dataset_version_id == DatasetVersion.id)
    holds = holds.where(DatasetSubject.subject_hmac == subject_hmac)
    seen = select(DatasetVersion.id).where(DatasetVersion.digest.in_(holds)).cte(recursive=True)
    twin = aliased(DatasetVersion)
    has_index = (
        exists()
        .where(DatasetSubject.dataset_version_id == twin.id, twin.digest == DatasetVersion.digest)
        .correlate(DatasetVersion)
    )
    return seen.union(_made_of(seen).where(~has_index))


def _made_of(seen: CTE) -> Select[Any]:
    """What was made of the versions in `seen`, wherever the same content was added."""
    child = aliased(DatasetVersion)
    return (
        select(DatasetVersion.id)
        .join(child, child.digest == DatasetVersion.digest)
        .join(DatasetParent, DatasetParent.child_id == child.id)
        .join(seen, DatasetParent.parent_id == seen.c.id)
    )


def _learned(session: Session, data: CTE) -> list[Found]:
    direct = select(AdapterDataset.version_id).join(data, data.c.id == AdapterDataset.dataset_version_id)
    family = direct.with_only_columns(AdapterDataset.version_id.label("id")).cte(recursive=True)
    family = family.union(select(AdapterParent.child_id).join(family, AdapterParent.parent_id == family.c.id))
    with walking(session):
        return _versions(session, select(family.c.id), set(session.scalars(direct)))


def _versions(session: Session, ids: Select[Any], direct: set[int]) -> list[Found]:
    """The versions with these ids and where each is served, in two statements."""
    chosen = ids.cte()
    serving: dict[int, list[Serving]] = {}
    open_now = (
        select(Deployment.version_id, Surface.name, Surface.audience, Deployment.weight_bp)
        .join(Surface)
        .where(Deployment.version_id.in_(select(chosen.c.id)), Deployment.ended_at.is_(None), Deployment.weight_bp > 0)
        .order_by(Surface.name)
    )
    for row in session.execute(open_now):
        serving.setdefault(row.version_id, []).append(Serving(row.name, row.audience, row.weight_bp))
    query = (
        select(
            AdapterVersion.id,
            Adapter.name,
            AdapterVersion.version,
            AdapterVersion.manifest_digest,
            AdapterVersion.lifecycle,
            AdapterVersion.hold_reason,
        )
        .join(Adapter)
        .where(AdapterVersion.id.in_(select(chosen.c.id)))
        .order_by(Adapter.name, AdapterVersion.version)
    )
    return [Found(*row, row.id in direct, tuple(serving.get(row.id, ()))) for row in session.execute(query)]


def _data(session: Session, chosen: CTE) -> list[FoundData]:
    query = (
        select(DatasetVersion.id, Dataset.name, DatasetVersion.version, DatasetVersion.digest, DatasetVersion.state)
        .join(Dataset)
        .where(DatasetVersion.id.in_(select(chosen.c.id)))
        .order_by(Dataset.name, DatasetVersion.version)
    )
    with walking(session):
        return [FoundData(*row) for row in session.execute(query)]
