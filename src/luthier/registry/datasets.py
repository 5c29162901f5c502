"""Data sets: what was learned from, why it may be, where it came from, and whose rows are in it.

A version is a content, known by its digest: that of the rows, which a training run records too, so that a run's adapter finds
its data here wherever the file lay. A folder has the digest of its files. Versions are only added, with parents that are there
already, so nothing descends from itself.

The index of people is read from a column of the rows, in the same pass that checks the digest, and kept all or not at all: a
version with an index answers for itself whether a person is in it, one without is taken to hold whoever its parents hold.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.orm import Session

from luthier.core.errors import DataError, RefusedError, RegistryError, did_you_mean
from luthier.data.read import digest_rows, stream_rows
from luthier.registry import audit
from luthier.registry.columns import DataState
from luthier.registry.copies import note_copy
from luthier.registry.database import Database, take_lock
from luthier.registry.people import SubjectColumn, SubjectKey
from luthier.registry.schema import (
    AuditEvent,
    Blocked,
    CopyElsewhere,
    Dataset,
    DatasetParent,
    DatasetSubject,
    DatasetVersion,
    ErasureRequest,
)

BATCH = 10_000
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
ADD_IT = "Add it with: luthier registry data add"
INDEXED = "data.subjects"
"""The audit event that says under which key a version was indexed."""


@dataclass(frozen=True)
class Terms:
    """Why a data set may be used, and until when. What is None is left as it is where the data set exists already."""

    owner: str | None = None
    license: str | None = None
    legal_basis: str | None = None
    purpose: str | None = None
    is_special_category: bool | None = None
    retention_until: datetime | None = None


@dataclass(frozen=True)
class AddedData:
    """What `add_data` did."""

    name: str
    version: int
    digest: str
    num_rows: int | None
    num_subjects: int
    is_new: bool


def add_data(
    database: Database,
    name: str,
    source: str | Path,
    terms: Terms,
    *,
    actor: str,
    parents: Sequence[tuple[str, str]] = (),
    subjects: SubjectColumn | None = None,
    held_out: str | Path | None = None,
) -> AddedData:
    """Add a content as a data set's next version; what the data set holds already is found again.

    `source` is a file of rows, a folder, or a Hub data set; `held_out` the file of a run's `data.eval_path`: such a run records
    one digest for both. `parents` are pairs of NAME:VERSION and what was done to it ("filtered", "mixed").
    Raises: DataError for rows that cannot be read, RegistryError for a parent that does not exist, RefusedError for content
    that was erased, that holds a person who was, or that was made of data that is frozen or erased.
    """
    digest, num_rows, people = _read(source, subjects)
    if held_out is not None:
        digest_2, num_rows_2, people_2 = _read(held_out, subjects)
        digest, people = hashlib.sha256((digest + digest_2).encode()).hexdigest(), people | people_2
        num_rows = (num_rows or 0) + (num_rows_2 or 0)
    with database.writing() as session:
        take_lock(session, "register")  # a freeze that comes now waits, and then finds this
        made_of = {find_version(session, named).id: transform for named, transform in parents}
        _refuse_erased(session, digest, people, list(made_of))
        dataset = _dataset(session, name, terms)
        version = session.scalar(select(DatasetVersion).filter_by(dataset_id=dataset.id, digest=digest))
        is_new = version is None
        if version is None:
            version = DatasetVersion(
                dataset=dataset, version=dataset.next_version, digest=digest, location=_location(source), num_rows=num_rows
            )
            dataset.next_version += 1
            session.add(version)
            session.flush()
            session.add_all(DatasetParent(child_id=version.id, parent_id=i, transform=how) for i, how in made_of.items())
        elif made_of and made_of != _parents(session, version.id):
            raise RefusedError(
                f"{name_of(version)} has this content already, with other parents; what it was made of cannot change. "
                "Add it under another name, or leave the parents out."
            )
        for place in (source, held_out or source):
            _note_copy(session, version, place)
        payload = {"digest": digest, "is_new": is_new, "parents": sorted(made_of)}
        events = [("data.add", payload)]
        if subjects:
            events.append(_add_people(session, version, people, subjects.key))
        for action, told in events:
            audit.record(session, actor, action, f"data/{name}/{version.version}", told)
    return AddedData(name, version.version, digest, num_rows, len(people), is_new)


def add_subjects(database: Database, named: str, source: str | Path, column: SubjectColumn, *, actor: str) -> int:
    """Index the people in a version's rows, read again from `source`, whose digest must be the version's; return their number.

    Raises: DataError if the file holds other rows or nobody, RefusedError for a person who was erased or another key.
    """
    digest, _, people = _read(source, column)
    with database.writing() as session:
        take_lock(session, "register")
        version = find_version(session, named)
        if digest != version.digest:
            raise DataError(
                f"'{source}' does not hold the rows of {named}: its digest is {digest[:16]}, not {version.digest[:16]}."
            )
        _refuse_erased(session, digest, people, [])
        _note_copy(session, version, source)
        action, told = _add_people(session, version, people, column.key)
        audit.record(session, actor, action, f"data/{version.dataset.name}/{version.version}", told)
    return len(people)


def check_key(session: Session, key: SubjectKey) -> None:
    """Raise RefusedError if people were indexed under another key: every answer under this one would be "nobody"."""
    told = session.scalar(select(AuditEvent).where(AuditEvent.action == INDEXED).order_by(AuditEvent.id.desc()).limit(1))
    if told is not None and told.payload["key_id"] != key.key_id:
        raise RefusedError(
            f"People were indexed under the key {told.payload['key_id']}, this file holds {key.key_id}: it would find nobody. "
            "Name the right file with --key."
        )


def find_versions(session: Session, named: str) -> list[DatasetVersion]:
    """Return the version NAME:VERSION, or all versions of NAME. Raises: RegistryError if there is none."""
    name, number = _split(named)
    query = select(DatasetVersion).join(Dataset).where(Dataset.name == name).order_by(DatasetVersion.version)
    found = list(session.scalars(query if number is None else query.where(DatasetVersion.version == number)))
    if not found:
        known = list(session.scalars(select(Dataset.name)))
        if name in known:
            hint = f"{name} has other versions: luthier registry data show {name}"
        else:
            hint = did_you_mean(name, known).strip() or ADD_IT
        raise RegistryError(f"There is no data set {named} in this registry. {hint}")
    return found


def find_version(session: Session, named: str) -> DatasetVersion:
    """Return the version NAME:VERSION, or the only version of NAME. Raises: RegistryError."""
    found = find_versions(session, named)
    if len(found) > 1:
        raise RegistryError(f"{named} has {len(found)} versions; say which, as in {named}:{found[-1].version}")
    return found[0]


def find_content(session: Session, digest: str) -> list[DatasetVersion]:
    """Return every version with the content of this digest, in whichever data set, oldest first; none of them is no error."""
    return list(session.scalars(select(DatasetVersion).filter_by(digest=digest).order_by(DatasetVersion.id)))


def list_data(session: Session) -> list[dict[str, Any]]:
    """Return every version as plain data, by name and number."""
    query = select(DatasetVersion, Dataset).join(Dataset).order_by(Dataset.name, DatasetVersion.version)
    return [_told(version, dataset) for version, dataset in session.execute(query)]


def show_data(session: Session, named: str) -> list[dict[str, Any]]:
    """Return versions as plain data with parents, children, the number of people and other copies. Raises: RegistryError."""
    return [
        _told(version, version.dataset)
        | {
            "parents": _neighbours(session, version.id, up=True),
            "children": _neighbours(session, version.id, up=False),
            "num_subjects": session.scalar(select(func.count()).where(DatasetSubject.dataset_version_id == version.id)),
            "copies": [
                {"kind": copy.kind, "location": copy.location}
                for copy in session.scalars(select(CopyElsewhere).where(CopyElsewhere.dataset_version_id == version.id))
            ],
        }
        for version in find_versions(session, named)
    ]


def name_of(version: DatasetVersion) -> str:
    """Return NAME:VERSION."""
    return f"{version.dataset.name}:{version.version}"


def _split(named: str) -> tuple[str, int | None]:
    name, colon, number = named.rpartition(":")
    return (name, int(number)) if colon and number.isdecimal() else (named, None)


def _read(source: str | Path, column: SubjectColumn | None) -> tuple[str, int | None, set[bytes]]:
    """The digest and number of rows of a source, and the people in them."""
    path, count, people = Path(source), itertools.count(), set[bytes]()
    if path.is_dir():
        if column:
            raise DataError(f"'{source}' is a folder; people are read from a column of one file of rows.")
        return _folder_digest(path), None, people

    def watched(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            next(count)
            if column:
                people.update(column.people(row))
            yield row

    digest = digest_rows(watched(stream_rows(source)), str(source))
    if column and not people:
        raise DataError(f"No row of '{source}' has a value in the column '{column.name}'; nothing was added.")
    return digest, next(count), people


def _folder_digest(folder: Path) -> str:
    """A sha256 over the paths below a folder and the sha256 of each file, in the order of the paths."""
    whole = hashlib.sha256()
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise DataError(f"'{folder}' holds no files.")
    for file in files:
        with file.open("rb") as stream:
            whole.update(f"{file.relative_to(folder).as_posix()}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _refuse_erased(session: Session, digest: str, people: set[bytes], parents: list[int]) -> None:
    faults = []
    if session.get(Blocked, digest):
        faults.append("this content was erased and may not come back")
    elif any(version.state is not DataState.ACTIVE for version in find_content(session, digest)):
        faults.append("this content is frozen, because it is being erased")
    if people:
        erased = session.scalars(select(Blocked.digest).join(ErasureRequest).where(ErasureRequest.kind == "subject"))
        if back := sum(bytes.fromhex(one) in people for one in erased):
            faults.append(f"it holds rows of {back} {'person' if back == 1 else 'people'} who were erased; take them out")
    states = select(DatasetVersion).where(DatasetVersion.id.in_(parents), DatasetVersion.state != DataState.ACTIVE)
    faults += [f"its parent {name_of(parent)} is {parent.state}" for parent in session.scalars(states)]
    if faults:
        raise RefusedError("The data was not added:\n  " + "\n  ".join(faults))


def _dataset(session: Session, name: str, terms: Terms) -> Dataset:
    """The data set of this name under these terms, made where there is none; its row stays locked, since it holds the number."""
    dataset = session.scalar(select(Dataset).filter_by(name=name).with_for_update())
    told = {field: value for field, value in asdict(terms).items() if value is not None}
    if dataset is None:
        _check_name(name)
        if "owner" not in told:
            raise RegistryError(f"The data set {name} is new; say who answers for it with --owner.")
        dataset = Dataset(name=name, **told)
        session.add(dataset)
        session.flush()
    for field, value in told.items():
        setattr(dataset, field, value)
    return dataset


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise RegistryError(f"{name!r} cannot name a data set; needed are letters, digits, '.', '_', '-' and '/', no ':'")


def _parents(session: Session, version_id: int) -> dict[int, str]:
    found = session.execute(select(DatasetParent.parent_id, DatasetParent.transform).where(DatasetParent.child_id == version_id))
    return {row.parent_id: row.transform for row in found}


def _note_copy(session: Session, version: DatasetVersion, source: str | Path) -> None:
    """The same content at another place: an erasure has to find it there too."""
    if (location := _location(source)) != version.location:
        note_copy(session, "data", location, data_id=version.id)


def _location(source: str | Path) -> str:
    return str(Path(source).absolute() if Path(source).exists() else source)


def _add_people(session: Session, version: DatasetVersion, people: set[bytes], key: SubjectKey) -> tuple[str, dict[str, Any]]:
    check_key(session, key)
    new = sorted(people.difference(session.scalars(select(DatasetSubject.subject_hmac).filter_by(dataset_version_id=version.id))))
    for start in range(0, len(new), BATCH):
        rows = [{"dataset_version_id": version.id, "subject_hmac": one} for one in new[start : start + BATCH]]
        session.execute(insert(DatasetSubject), rows)
    return INDEXED, {"key_id": key.key_id, "num_subjects": len(people)}


def _told(version: DatasetVersion, dataset: Dataset) -> dict[str, Any]:
    fields = ("owner", "license", "legal_basis", "purpose", "is_special_category", "retention_until")
    return {
        "name": dataset.name,
        "version": version.version,
        "digest": version.digest,
        "state": version.state.value,
        "num_rows": version.num_rows,
        "location": version.location,
        "created_at": version.created_at,
    } | {field: getattr(dataset, field) for field in fields}


def _neighbours(session: Session, version_id: int, *, up: bool) -> list[dict[str, str]]:
    here, there = (DatasetParent.child_id, DatasetParent.parent_id) if up else (DatasetParent.parent_id, DatasetParent.child_id)
    query = (
        select(DatasetVersion, DatasetParent.transform).join(DatasetParent, there == DatasetVersion.id).where(here == version_id)
    )
    return [{"name": name_of(version), "transform": transform} for version, transform in session.execute(query)]
