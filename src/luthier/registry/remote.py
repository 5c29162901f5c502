"""Blobs in an object store, through fsspec: put if absent, read checked, deleted with every version.

S3 keeps what is deleted where a bucket has versions: a plain delete leaves the bytes behind a marker. Here a delete removes
every version and every marker, looks again, and fails if anything remains (a legal hold, a retention rule).
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, cast

from luthier.core.errors import BlobError, MissingExtraError, StorageError
from luthier.registry.blobs import BlobStore, Stored, _relative, sha256_of

FORGETFUL = frozenset({"memory", "file", "local"})
"""File systems of fsspec that keep nothing of what was removed."""


class RemoteBlobs(BlobStore):
    """Blobs below a URL that fsspec knows."""

    def __init__(self, url: str):
        from fsspec.core import url_to_fs

        self.place = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self.files, self.root = url_to_fs(self.place, use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            raise MissingExtraError("s3fs", "s3", f"A store of blobs at {protocol}://") from error
        except ValueError as error:
            raise BlobError(f"{url!r} is no place for blobs: {error}. Needed a folder or s3://BUCKET/PREFIX.") from error
        self.is_s3 = protocol in ("s3", "s3a")
        self.forgets = protocol in FORGETFUL

    def put(self, source: Path) -> tuple[str, int]:
        with source.open("rb") as stream:
            digest, size = sha256_of(stream)
        with suppress(FileExistsError):
            self._write(source, digest)
        with source.open("rb") as stream:
            if sha256_of(stream) != (digest, size):
                self.delete(digest)
                raise StorageError(f"{source} changed while it was stored; nothing was kept. Try again when nobody writes to it.")
        if (found := self.size(digest)) != size:
            raise BlobError(f"Blob {digest} in {self.place} has {found} bytes, needs {size:,}. Remove it, and store it again.")
        return digest, size

    def put_bytes(self, data: bytes) -> tuple[str, int]:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return self.put(Path(file.name))

    def size(self, digest: str) -> int | None:
        try:
            with self._reached():
                return int(self.files.info(self._path(digest))["size"])
        except FileNotFoundError:
            return None

    def open(self, digest: str) -> BinaryIO:
        try:
            with self._reached():
                return cast(BinaryIO, self.files.open(self._path(digest), "rb"))
        except FileNotFoundError as error:
            raise self._missing(digest) from error

    def delete(self, digest: str) -> None:
        path = self._path(digest)
        if self.is_s3:
            self._delete_versions(path)
            return
        with suppress(FileNotFoundError):
            self.files.rm_file(path)
        if self.files.exists(path):
            raise BlobError(f"Blob {digest} is still in {self.place} after it was deleted")
        if not self.forgets:
            raise BlobError(
                f"Blob {digest} was removed from {self.place}, but whether that store keeps older versions is not known here. "
                "Check the bucket's versions and retention by hand."
            )

    def stored(self) -> Iterator[Stored]:
        try:
            found = self.files.find(f"{self.root}/sha256", detail=True)
        except FileNotFoundError:
            return
        for path, entry in found.items():
            modified = entry.get("LastModified") or entry.get("mtime") or entry.get("created") or datetime.now(UTC)
            yield Stored(path.rpartition("/")[2], int(entry["size"]), modified)

    def leftovers(self) -> Iterator[Stored]:
        """Yield the uploads in parts that were begun and not finished (S3 keeps those, and asks money for them)."""
        if not self.is_s3:
            return
        bucket, _, prefix = self.root.partition("/")
        listed = self.files.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/sha256/".lstrip("/"))
        for upload in listed.get("Uploads", []):
            yield Stored(f"{upload['Key']}?{upload['UploadId']}", 0, upload["Initiated"])

    def remove_leftover(self, left: Stored) -> None:
        key, _, upload = left.name.rpartition("?")
        bucket = self.root.partition("/")[0]
        self.files.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)

    def _path(self, digest: str) -> str:
        return f"{self.root}/{_relative(digest)}"

    def _write(self, source: Path, digest: str) -> None:
        with self._reached():
            self.files.put_file(os.fspath(source), self._path(digest), mode="create")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Tell a store that refuses or does not answer as a StorageError; that something is (not) there passes through."""
        try:
            yield
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise StorageError(error.errno, f"not reached: {error.strerror or error}", self.place) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("botocore", "aiobotocore", "aiohttp"):
                raise
            raise StorageError(f"{self.place} was not reached: {error}. Check the address and the keys.") from error

    def _delete_versions(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        reasons: list[str] = []
        for version in self._versions(bucket, key):
            try:
                self.files.call_s3("delete_object", Bucket=bucket, Key=key, VersionId=version)
            except OSError as error:
                reasons.append(str(error))
        self.files.invalidate_cache(path)
        if left := self._versions(bucket, key):
            told = f" ({'; '.join(sorted(set(reasons)))})" if reasons else ""
            raise BlobError(f"{len(left)} versions of s3://{path} could not be deleted{told}. Lift the hold or retention first.")

    def _versions(self, bucket: str, key: str) -> list[str]:
        """The ids of all versions and delete markers of one object ("null" where the bucket never had versions)."""
        found: list[str] = []
        markers: dict[str, Any] = {}
        while True:
            page = self.files.call_s3("list_object_versions", Bucket=bucket, Prefix=key, **markers)
            entries = [*page.get("Versions", []), *page.get("DeleteMarkers", [])]
            found += [entry["VersionId"] for entry in entries if entry["Key"] == key]
            if not page.get("IsTruncated"):
                return found
            markers = {"KeyMarker": page["NextKeyMarker"], "VersionIdMarker": page["NextVersionIdMarker"]}
