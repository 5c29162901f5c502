"""Where a registry is, and opening it.

    $LUTHIER_REGISTRY, or registry/ in $LUTHIER_HOME or in the user's data folder
        registry.sqlite3        the tables
        blobs/                  the files of all versions, under their digests
        cache/                  versions that were fetched

Any of these names a place: a folder, sqlite:///FILE (blobs beside the file), or postgresql://USER@HOST/NAME?blobs=PLACE, where
PLACE is a folder that all users share, or s3://BUCKET/PREFIX. $LUTHIER_BLOBS says where the blobs are if the URL does not.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError

from luthier.core.errors import RegistryError
from luthier.models.cache import luthier_home
from luthier.registry.blobs import BlobStore, open_blobs
from luthier.registry.database import Database, open_database
from luthier.registry.migrations import current_revision, migrate

FILE = "registry.sqlite3"
MOUNTS = Path("/proc/self/mounts")
NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "afs", "lustre", "beegfs"})


@dataclass(frozen=True)
class Registry:
    """An open registry: its tables, the bytes of its files, and the folder for versions that were fetched."""

    place: str
    database: Database
    blobs: BlobStore
    cache: Path


def default_place() -> str:
    """Return $LUTHIER_REGISTRY, or `registry` in $LUTHIER_HOME or in the user's data folder."""
    if place := os.environ.get("LUTHIER_REGISTRY"):
        return place
    if os.environ.get("LUTHIER_HOME"):
        return str(luthier_home() / "registry")
    data = os.environ.get("XDG_DATA_HOME")
    return str((Path(data) if data else Path.home() / ".local/share") / "luthier" / "registry")


def open_registry(place: str | Path | None = None, *, create: bool = False) -> Registry:
    """Open the registry at a folder or URL (default: `default_place()`), and bring its tables to the present schema.

    With `create` it is made where there is none. Raises: RegistryError if there is none or it cannot be reached.
    """
    url, blobs = _split(str(place or default_place()))
    if url.get_backend_name() not in ("sqlite", "postgresql", "postgres"):
        raise RegistryError(f"{place} cannot hold a registry; needed a folder, sqlite:///FILE or postgresql://USER@HOST/NAME")
    is_file = url.get_backend_name() == "sqlite"
    shown = str(url.database) if is_file else url.render_as_string(hide_password=True)
    if is_file:
        file = Path(url.database or "")
        _check_file(file, create)
        blobs, cache = blobs or str(file.parent / "blobs"), file.parent / "cache"
    else:
        cache = luthier_home() / "registry"
    if blobs is None:
        raise RegistryError(
            f"{shown} does not say where its files are. Add ?blobs=s3://BUCKET/PREFIX (or a folder that all users share) to the "
            "URL, or set LUTHIER_BLOBS."
        )
    database = open_database(url.render_as_string(hide_password=False))
    try:
        if not create and current_revision(database) is None:
            raise RegistryError(f"There is no registry at {shown}. {_WAY_OUT}")
        migrate(database)
    except BaseException as error:
        database.engine.dispose()
        if isinstance(error, DatabaseError):
            raise RegistryError(f"The registry at {shown} cannot be opened: {error.orig}") from error
        raise
    return Registry(shown, database, open_blobs(blobs), cache)


_WAY_OUT = "`luthier registry add` makes one; --registry or LUTHIER_REGISTRY names another place."


def _split(place: str) -> tuple[URL, str | None]:
    """The URL of the database, and where the blobs are if the place or the environment says so."""
    blobs = os.environ.get("LUTHIER_BLOBS")
    if "://" not in place:
        return URL.create("sqlite", database=str(Path(place).expanduser().absolute() / FILE)), blobs
    try:
        url = make_url(place)
    except ArgumentError as error:
        raise RegistryError(
            f"{place!r} is no place of a registry; needed a folder, sqlite:///FILE or postgresql://..."
        ) from error
    if url.get_backend_name() == "sqlite":
        if not url.database or url.database == ":memory:":
            raise RegistryError(f"{place!r} names no file; a registry lasts. Needed a folder or sqlite:///FILE.")
        url = url.set(database=str(Path(url.database).expanduser().absolute()))
    told = url.query.get("blobs")
    return url.difference_update_query(["blobs"]), (told if isinstance(told, str) or told is None else told[-1]) or blobs


def _check_file(file: Path, create: bool) -> None:
    """Refuse a file that is not there, cannot be made, or lies where SQLite's locks do not hold."""
    if not create and not file.is_file():
        raise RegistryError(f"There is no registry at {file}. {_WAY_OUT}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RegistryError(f"No registry can be made at {file}: {error.strerror}. {_WAY_OUT}") from error
    if (kind := _file_system(file.parent)) in NETWORK_FILE_SYSTEMS:
        raise RegistryError(
            f"{file} is on a network file system ({kind}), where SQLite's locks do not hold and a registry is damaged sooner or "
            "later. Choose a local folder, or PostgreSQL: --registry 'postgresql://USER@HOST/NAME?blobs=PLACE'."
        )


def _file_system(folder: Path) -> str | None:
    """The kind of file system a folder lies on, where the kernel tells (Linux)."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return None
    mounts = {Path(words[1].replace("\\040", " ")): words[2] for line in lines if len(words := line.split()) > 2}
    folder = folder.resolve()
    return next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), None)
