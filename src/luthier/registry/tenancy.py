"""Tenants' words: what a key may do, what a tenant may use up, and what a key looks like. Plain data; no tables.

A key is `lk_` and 43 characters drawn at random (256 bits), so its SHA-256 can be kept and looked up as it is: nobody guesses
it, and whoever reads the table cannot use what stands there. It is shown once, when it is made.
"""

import enum
import hashlib
import secrets

from pydantic import Field

from luthier.core.settings import Settings

KEY_MARK = "lk_"
SHOWN = len(KEY_MARK) + 6
"""So much of a key is kept in the clear, to tell keys apart in lists and logs."""


class Scope(enum.StrEnum):
    """What a key may do."""

    INFERENCE = "inference"
    ADMIN = "admin"  # manage tenants and keys, erase; on a gateway load, unload, drain, and see every metric
    REGISTER = "register"
    PROMOTE = "promote"
    APPROVE = "approve"


GOVERNING = frozenset({Scope.REGISTER, Scope.PROMOTE, Scope.APPROVE})
"""Scopes that change what may go out. Once a key has one of them, the registry asks for keys (tenants.py)."""


class GrantKind(enum.StrEnum):
    """What a tenant may be granted."""

    ADAPTER = "adapter"  # all its versions, and its aliases
    VERSION = "version"
    SURFACE = "surface"
    BASE = "base"


class Quotas(Settings):
    """What a tenant may use up; None: as much as it likes."""

    requests_per_minute: int | None = Field(default=None, ge=1, description="requests that may begin within a minute")
    tokens_per_minute: int | None = Field(default=None, ge=1, description="tokens of prompts and answers within a minute")
    tokens_per_day: int | None = Field(default=None, ge=1, description="tokens of prompts and answers within a day (UTC)")
    concurrent: int | None = Field(default=None, ge=1, description="requests at the same time")


def new_key() -> str:
    """Draw a key."""
    return KEY_MARK + secrets.token_urlsafe(32)


def digest_of_key(key: str) -> str:
    """Return what is kept of a key: its SHA-256 in hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()
