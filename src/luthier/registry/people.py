"""People, known to the registry by an HMAC only: the key lies in a file outside the database.

Whoever has the database alone cannot tell who is in it, nor try names. Without the key every question about a person ends;
destroying it erases the whole index at once.
"""

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import ConfigError, RegistryError

KEY_BYTES = 32
_PURPOSE = b"luthier subject\0"


class SubjectKey:
    """The key under which people's identifiers become digests."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self.key_id = hashlib.sha256(b"luthier subject key\0" + secret).hexdigest()[:16]

    def hmac(self, identifier: Any) -> bytes:
        """Return the 32 bytes that stand for a person. Numbers count by their text: 17 and "17" are the same person."""
        return hmac.digest(self._secret, _PURPOSE + str(identifier).encode(), "sha256")


@dataclass(frozen=True)
class SubjectColumn:
    """The column that names people, and the key that hides them."""

    name: str
    key: SubjectKey

    def people(self, row: dict[str, Any]) -> Iterator[bytes]:
        """Yield the HMACs of the people in a row: one identifier, a list of them, or none."""
        value = row.get(self.name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one != "":
                yield self.key.hmac(one)


def read_key(path: Path) -> SubjectKey:
    """Return the key in a file. Raises: RegistryError if there is none, ConfigError if others could read it."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        secret = path.read_bytes()
    except FileNotFoundError:
        raise RegistryError(
            f"There is no key at {path}, so no person can be looked up. It is made when subjects are first added; restore it "
            "from where it is kept, or name another file with --key."
        ) from None
    if mode & 0o077:
        raise ConfigError(f"{path} may be read by others (mode {mode:04o}, needed 0600). Run: chmod 600 {path}")
    if len(secret) != KEY_BYTES:
        raise ConfigError(f"{path} holds {len(secret)} bytes, a key has {KEY_BYTES}; this is another file.")
    return SubjectKey(secret)


def make_key(path: Path) -> SubjectKey:
    """Return the key in a file, which is made with mode 0600 where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
    return read_key(path)
