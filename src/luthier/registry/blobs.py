"""The bytes of every file that the registry keeps, each under the SHA-256 of what is in it.

    PLACE/sha256/ab/abcd...     a blob; the same bytes are stored once, whoever brings them
    PLACE/tmp/                  being written (local stores); whoever was killed there left a file that gc removes

A blob is there whole or not at all, and whatever is read is hashed again: bytes that are not those that were stored are an
error, never an answer. A blob is put before the row that names it, so a writer that dies leaves a blob too many, not a row
too many. This file knows no row.
"""

import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from luthier.core.errors import BlobError, StorageError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A blob in the store, or a file that a dead writer left there (then `name` is no digest)."""

    name: str
    size: int
    modified: datetime


def sha256_of(stream: BinaryIO, copy: BinaryIO | None = None) -> tuple[str, int]:
    """Return the digest and length of what a stream holds, writing it to `copy` on the way."""
    hasher, size = hashlib.sha256(), 0
    while chunk := stream.read(CHUNK):
        hasher.update(chunk)
        size += len(chunk)
        if copy is not None:
            copy.write(chunk)
    return hasher.hexdigest(), size


class BlobStore(ABC):
    """A store of bytes by digest. `place` is its folder or URL."""

    place: str

    @abstractmethod
    def put(self, source: Path) -> tuple[str, int]:
        """Store a file and return its digest and size. What is there already is not written again."""

    @abstractmethod
    def put_bytes(self, data: bytes) -> tuple[str, int]:
        """Store bytes and return their digest and size."""

    @abstractmethod
    def size(self, digest: str) -> int | None:
        """Return how many bytes are stored under a digest, None if it is not there. Reads none of them."""

    @abstractmethod
    def open(self, digest: str) -> BinaryIO:
        """Return the stored bytes as a stream, unchecked. Raises: BlobError if there are none."""

    @abstractmethod
    def delete(self, digest: str) -> None:
        """Remove a blob with every version that the store keeps of it; nothing happens where there is none.

        Raises: BlobError if anything of it remains, or if this kind of store cannot tell.
        """

    @abstractmethod
    def stored(self) -> Iterator[Stored]:
        """Yield every blob."""

    @abstractmethod
    def leftovers(self) -> Iterator[Stored]:
        """Yield what writers have not finished, because they are at it or were killed."""

    @abstractmethod
    def remove_leftover(self, left: Stored) -> None:
        """Remove one of `leftovers`. A writer that still was at it fails."""

    def fault(self, digest: str) -> str | None:
        """Read a blob to its end and return what is wrong with it, None if nothing is."""
        if self.size(digest) is None:
            return "is missing"
        with self.open(digest) as stream:
            found, size = sha256_of(stream)
        return None if found == digest else f"is damaged: its {size:,} bytes have the digest {found[:16]}"

    def read(self, digest: str) -> bytes:
        """Return the bytes under a digest, checked. Raises: BlobError if they are missing or damaged."""
        copy = BytesIO()
        self._copy(digest, copy)
        return copy.getvalue()

    def fetch(self, digest: str, target: Path) -> None:
        """Write the bytes under a digest to the file `target`, which appears whole or not at all.

        Raises: BlobError if they are missing or damaged, StorageError.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                self._copy(digest, file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _copy(self, digest: str, copy: BinaryIO) -> None:
        with self.open(digest) as stream:
            found, size = sha256_of(stream, copy)
        if found != digest:
            raise BlobError(
                f"Blob {digest} in {self.place} is damaged: its {size:,} bytes have the digest {found}. Nothing was loaded; "
                "restore it from a backup, or register the same adapter again, which puts it right."
            )

    def _missing(self, digest: str) -> BlobError:
        return BlobError(f"Blob {digest} is missing from {self.place}; restore it, or register the same adapter again.")


class LocalBlobs(BlobStore):
    """Blobs in a folder: written beside it, flushed to the disk, renamed, and the folder flushed too."""

    def __init__(self, folder: Path):
        self.place = str(folder)
        self.folder = folder

    def put(self, source: Path) -> tuple[str, int]:
        """Store a file and return its digest and size; a stored copy that is damaged is put right."""
        with source.open("rb") as stream:
            return self._put(stream)

    def put_bytes(self, data: bytes) -> tuple[str, int]:
        return self._put(BytesIO(data))

    def size(self, digest: str) -> int | None:
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def open(self, digest: str) -> BinaryIO:
        try:
            return self._path(digest).open("rb")
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    def delete(self, digest: str) -> None:
        path = self._path(digest)
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            _flush_folder(path.parent)

    def stored(self) -> Iterator[Stored]:
        yield from _files(self.folder / "sha256")

    def leftovers(self) -> Iterator[Stored]:
        yield from _files(self.folder / "tmp")

    def remove_leftover(self, left: Stored) -> None:
        (self.folder / "tmp" / left.name).unlink(missing_ok=True)

    def _put(self, stream: BinaryIO) -> tuple[str, int]:
        temporary = self.folder / "tmp"
        try:
            _make_folder(temporary)
            handle, name = tempfile.mkstemp(dir=temporary)
            try:
                with os.fdopen(handle, "wb") as file:
                    digest, size = sha256_of(stream, file)
                    if self.size(digest) == size and self.fault(digest) is None:
                        return digest, size
                    file.flush()
                    os.fchmod(file.fileno(), 0o444)
                    os.fsync(file.fileno())
                path = self._path(digest)
                _make_folder(path.parent)
                os.replace(name, path)
                _flush_folder(path.parent)
                return digest, size
            finally:
                Path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(error.errno, f"not stored: {error.strerror or error}", self.place) from error

    def _path(self, digest: str) -> Path:
        return self.folder / _relative(digest)


def open_blobs(place: str) -> BlobStore:
    """Return the store at a folder or a URL that fsspec knows (s3://BUCKET/PREFIX needs the extra 's3')."""
    if place.startswith("file://"):
        place = place.removeprefix("file://")
    if "://" not in place:
        return LocalBlobs(Path(place).expanduser().absolute())
    from luthier.registry.remote import RemoteBlobs

    return RemoteBlobs(place)


def _relative(digest: str) -> str:
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise BlobError(f"{digest!r} is no SHA-256; blobs are named by 64 hexadecimal digits")
    return f"sha256/{digest[:2]}/{digest}"


def _files(folder: Path) -> Iterator[Stored]:
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            status = path.stat()
        except FileNotFoundError:  # finished or removed meanwhile
            continue
        if path.is_file():
            yield Stored(path.name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _make_folder(folder: Path) -> None:
    """Make a folder that is still there after a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
