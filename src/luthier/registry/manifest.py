"""What names a version's exact bytes: the list of its files with sizes and digests, as JSON that has one spelling."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class FileEntry:
    """One file of a version."""

    path: str
    size: int
    sha256: str


def canonical_json(value: Any) -> bytes:
    """Return plain JSON in the one spelling that digests and signatures are made of: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def manifest_of(files: Iterable[FileEntry]) -> list[dict[str, Any]]:
    """Return the manifest: a mapping {path, size, sha256} for each file, by path."""
    return [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in sorted(files)]
