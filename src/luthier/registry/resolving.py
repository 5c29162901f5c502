"""resolve(): a version becomes a folder on this machine, every byte of which is the registered one, or an error.

    CACHE/NAME/VERSION-MANIFEST/        a version that was fetched, with its files under their own names

A folder that is there already is hashed again before it is handed out: a disk that forgets, or a hand that edits, is found
then. What is held, retired or erased is never handed out, however it is named. The place of the copy is noted, so that an
erasure finds it.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select

from luthier.core.atomic import put_in_place
from luthier.core.errors import RefusedError
from luthier.registry.blobs import sha256_of
from luthier.registry.columns import Lifecycle
from luthier.registry.place import Registry
from luthier.registry.schema import AdapterFile, AdapterVersion, CopyElsewhere
from luthier.registry.versions import find_version, name_of

CACHED = "cache"
"""The kind of a noted copy that this file made."""


@dataclass(frozen=True)
class Resolved:
    """A version on this machine: its NAME:VERSION, its folder, and the registered sha256 of each file in it."""

    reference: str
    folder: Path
    digests: dict[str, str]


def resolve(registry: Registry, reference: str) -> Path:
    """Return a folder with the files of NAME:VERSION or NAME:ALIAS, each checked against its digest.

    Raises: what `resolve_version` raises.
    """
    return resolve_version(registry, reference).folder


def resolve_version(registry: Registry, reference: str) -> Resolved:
    """Resolve NAME:VERSION or NAME:ALIAS, and say which version it is now and what its files must be.

    Raises: RegistryError where there is no such version, RefusedError for one that is held, retired or erased, BlobError for
    bytes that are missing or damaged (nothing is handed out then), StorageError.
    """
    with registry.database.reading() as session:
        version = find_version(session, reference)
        check_usable(version)
        files = list(version.files)
        folder = registry.cache / version.adapter.name / f"{version.version}-{version.manifest_digest[:16]}"
        resolved = Resolved(name_of(version), folder, {file.path: file.blob_digest for file in files})
        known = select(CopyElsewhere.id).filter_by(version_id=version.id, location=str(folder))
        is_known = session.scalar(known) is not None  # the folder may be another registry's, which shares the cache
    is_whole = folder_fault(folder, files) is None
    if is_known and is_whole:
        return resolved
    with registry.database.writing() as session:  # noted first: a copy that nobody knows of would outlive an erasure
        check_usable(session.get_one(AdapterVersion, version.id, with_for_update={"read": True}))
        if session.scalar(known) is None:
            session.add(CopyElsewhere(version_id=version.id, kind=CACHED, location=str(folder)))
    if not is_whole:
        _fetch(registry, folder, files)
    return resolved


def check_usable(version: AdapterVersion) -> None:
    """Raise RefusedError if a version may not be used: erased, retired or held."""
    if version.lifecycle is Lifecycle.ERASED:
        raise RefusedError(f"{name_of(version)} was erased; its number stays, its files are gone.")
    if version.hold_reason:
        raise RefusedError(f"{name_of(version)} is held and may not be used: {version.hold_reason}")
    if version.lifecycle is Lifecycle.RETIRED:
        raise RefusedError(f"{name_of(version)} is retired. Name another version; `luthier registry list` shows them.")


def folder_fault(folder: Path, files: list[AdapterFile]) -> str | None:
    """Return how a folder differs from what was registered (a file missing, added or changed), None if it does not."""
    if not folder.is_dir():
        return f"{folder} is not there"
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    registered = {file.path: file for file in files}
    if odd := sorted(found.keys() ^ registered.keys()):
        return f"{folder} has other files than were registered: {', '.join(odd[:5])}"
    for name, path in found.items():
        with path.open("rb") as stream:
            if sha256_of(stream) != (registered[name].blob_digest, registered[name].size):
                return f"{path} is not the file that was registered"
    return None


def _fetch(registry: Registry, folder: Path, files: list[AdapterFile]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".tmp", dir=folder.parent))
    try:
        for file in files:
            registry.blobs.fetch(file.blob_digest, temporary / file.path)
        temporary.chmod(0o755)
        try:
            put_in_place(temporary, folder)
        except OSError:
            if folder_fault(folder, files):  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
