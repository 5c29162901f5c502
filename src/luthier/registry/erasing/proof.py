"""The proof that nothing is left: traces are taken before anything is deleted, and looked for when all of it is."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError
from luthier.registry.blobs import LocalBlobs
from luthier.registry.columns import BlobState, Row
from luthier.registry.erasing.items import items
from luthier.registry.erasing.reach import Plan, local_path
from luthier.registry.erasing.traces import Search, Trace, traces_of, traces_of_texts
from luthier.registry.place import Registry
from luthier.registry.schema import AdapterVersion, Blob, DatasetSubject

TRACES_PER_BLOB, TRACES_PER_FILE = 16, 64
LARGEST_TRACED = 1 << 30
ROWS_AT_ONCE = 10_000  # a table of usage may have millions


def take_traces(registry: Registry, session: Session, found: Plan, who: str | None) -> set[Trace]:
    """Return traces of the weights, rows and texts that a plan reaches; with `who`, only of rows that hold these characters."""
    return _row_traces(session, found) | _blob_traces(registry, found) | _file_traces(found, who)


def search_all(registry: Registry, number: int) -> dict[str, Any]:
    """Look for the traces everywhere and return what was searched. Raises: RefusedError with all that should be gone."""
    with registry.database.reading() as session:
        known = items(session, number)
        traces = [(value, digest) for item in known if item.kind == "traces" for value, digest in item.evidence["traces"]]
        gone = {item.target for item in known if item.kind == "blob" and item.state == "done"}
        present = set(session.scalars(select(Blob.digest).where(Blob.state == BlobState.PRESENT)))
    search, faults, kept = Search(traces), [], []
    faults += [f"blob {digest} is still stored" for digest in sorted(gone) if registry.blobs.size(digest) is not None]
    for stored in list(registry.blobs.stored()):
        with registry.blobs.open(stored.name) as stream:
            found = search.found_in(stream)
        if found and stored.name in present:
            kept.append(stored.name)
        elif found:
            faults.append(f"blob {stored.name}, which no row names, holds bytes of it")
    for left in list(registry.blobs.leftovers()):
        if _is_left(registry, left.name, search, gone):
            registry.blobs.remove_leftover(left)
    for item in known:
        if item.kind == "copy" and item.state == "done" and (path := local_path(item.target)) and path.exists():
            faults.append(f"{item.target} is still there")
    faults += [f"{file} holds bytes of it" for file, _ in search.found_below(registry.cache)]
    database_bytes, remnants, in_rows = _search_database(registry, search)
    faults += remnants
    if faults:
        raise RefusedError(f"Erasure {number} is not complete:\n  " + "\n  ".join(faults) + "\nResume it when this is put right.")
    return {
        "num_traces": len(search.traces),
        "num_bytes": search.num_bytes,
        "database_bytes": database_bytes,
        "kept_blobs_with_traces": kept,
        "traces_in_rows_that_stay": in_rows,
    }


def _is_left(registry: Registry, name: str, search: Search, gone: set[str]) -> bool:
    """Whether what a killed writer left is of what was erased."""
    if isinstance(registry.blobs, LocalBlobs):
        return any(True for _ in search.found_below(registry.blobs.folder / "tmp" / name))
    return any(digest in name for digest in gone)


def _search_database(registry: Registry, search: Search) -> tuple[int, list[str], int]:
    """(bytes searched, what was found in the database's files but in no row, how many traces rows that stay hold rightly)."""
    in_rows = _in_rows(registry, search)
    if not registry.database.is_sqlite:
        return 0, [], len(in_rows)
    file = Path(registry.database.url.database or "")
    size, remnants = 0, []
    for one in (file, *(file.with_name(file.name + end) for end in ("-wal", "-shm", "-journal"))):
        size += one.stat().st_size if one.exists() else 0
        for path, found in search.found_below(one):
            if left := found - in_rows:
                remnants.append(f"{path} holds {len(left)} traces of it outside of all rows")
    return size, remnants, len(in_rows)


def _in_rows(registry: Registry, search: Search) -> set[Trace]:
    """The traces that living rows hold: another version may have the same licence or recipe."""
    found: set[Trace] = set()
    with registry.database.engine.connect() as connection:
        for table in Row.metadata.sorted_tables:
            for rows in connection.exec_driver_sql(f"SELECT * FROM {table.name}").partitions(ROWS_AT_ONCE):
                values = [_raw(value) for row in rows for value in row if value is not None]
                found |= search.found_in(BytesIO(b"\0".join(values)))
    return found


def _raw(value: Any) -> bytes:
    if isinstance(value, bytes | memoryview):
        return bytes(value)
    return (value if isinstance(value, str) else json.dumps(value, default=str)).encode()


def _row_traces(session: Session, found: Plan) -> set[Trace]:
    """Traces of the texts that will be dropped and of the people's HMACs."""
    traces: set[Trace] = set()
    for version in session.scalars(select(AdapterVersion).where(AdapterVersion.id.in_([one.id for one in found.versions]))):
        texts = [version.license, version.intended_use, version.limitations, version.consent, version.no_data_reason]
        for words in filter(None, texts):
            traces |= traces_of(words.encode(), 4)
        for plain in (version.recipe, version.metrics, version.environment):
            traces |= traces_of_texts(json.dumps(plain).encode(), TRACES_PER_BLOB)
    people = select(DatasetSubject.subject_hmac).where(DatasetSubject.dataset_version_id.in_([one.id for one in found.data]))
    staying = select(DatasetSubject.subject_hmac).where(DatasetSubject.dataset_version_id.not_in([one.id for one in found.data]))
    for person in session.scalars(people.where(DatasetSubject.subject_hmac.not_in(staying)).limit(TRACES_PER_FILE)):
        traces |= traces_of(person, 1)
    return traces


def _blob_traces(registry: Registry, found: Plan) -> set[Trace]:
    """Traces of weights: half of a file lies behind its header, whose words are those of every adapter."""
    traces: set[Trace] = set()
    for digest, told in found.blobs.items():
        size = registry.blobs.size(digest)
        if told["is_weights"] and size is not None and size <= LARGEST_TRACED:
            traces |= traces_of(registry.blobs.read(digest), TRACES_PER_BLOB, start=size // 2)
    return traces


def _file_traces(found: Plan, who: str | None) -> set[Trace]:
    """Traces of rows: of all, or of those that name the person."""
    traces: set[Trace] = set()
    for location, told in found.copies.items():
        path = local_path(location)
        if told["kind"] != "data" or path is None or not path.is_file() or path.stat().st_size > LARGEST_TRACED:
            continue
        data = path.read_bytes()
        if who is not None:
            data = b"\n".join(line for line in data.splitlines() if who and who.encode() in line)
        is_text = path.suffix.startswith((".json", ".ndjson"))
        traces |= traces_of_texts(data, TRACES_PER_FILE) if is_text else traces_of(data, TRACES_PER_FILE)
    return traces
