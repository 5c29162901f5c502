"""Signatures: Ed25519 keys in files, and DSSE envelopes that say what was signed and by which key.

    signed bytes = "DSSEv1" SP length(type) SP type SP length(payload) SP payload

The payload's type is under the signature too, so an envelope made for one purpose cannot be passed off as one for another. A
key's name is the SHA-256 of its public half (SubjectPublicKeyInfo, DER); whether a key is trusted is decided by the keys that a
caller gives, never by what an envelope says of itself. Sources: DSSE v1 (github.com/secure-systems-lab/dsse), RFC 8032.
"""

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from luthier.core.atomic import write_atomic
from luthier.core.errors import SignatureError
from luthier.models.cache import luthier_home

PUBLIC_SUFFIX = ".pub"

PublicKeys = Mapping[str, Ed25519PublicKey]
"""Trusted keys by their names."""


@dataclass(frozen=True)
class Signed:
    """What a valid envelope holds, and which trusted key vouches for it."""

    payload: bytes
    payload_type: str
    key_id: str


def default_trusted() -> Path:
    """Return the folder of trusted public keys: $LUTHIER_TRUSTED_KEYS, or trusted-keys in luthier's home.

    It is no part of a registry: who may write there must not be able to say whom to trust.
    """
    given = os.environ.get("LUTHIER_TRUSTED_KEYS")
    return Path(given).expanduser() if given else luthier_home() / "trusted-keys"


def key_id(key: Ed25519PublicKey) -> str:
    """Return a public key's name: the SHA-256 of its DER form, in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def make_key(path: Path) -> str:
    """Write a new private key to `path`, which only its owner may read, and its public half to `path`.pub; return its name.

    Raises: SignatureError if one of the two files exists, since a key that is overwritten is lost.
    """
    public = public_path(path)
    if there := [str(file) for file in (path, public) if file.exists()]:
        raise SignatureError(f"not overwriting {' and '.join(there)}; choose another name for the new key")
    key = Ed25519PrivateKey.generate()
    write_atomic(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    write_atomic(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return key_id(key.public_key())


def public_path(path: Path) -> Path:
    """Return where the public half of the private key at `path` lies."""
    return path.with_name(path.name + PUBLIC_SUFFIX)


def read_key(path: Path) -> Ed25519PrivateKey:
    """Return the private key in a PEM file. Raises: SignatureError if it is none, or if others may read it."""
    content = _read(path)
    if mode := stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SignatureError(f"the private key {path} is open to others (mode {mode:03o} of 077): chmod 600 {path}")
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} is no private key in PEM form without a passphrase: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path} holds a {type(key).__name__}; signatures here are Ed25519: luthier registry keygen")
    return key


def trusted_keys(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Return the public keys in a folder's *.pub files by name; an absent folder trusts nobody. Raises: SignatureError."""
    keys = [_read_public(path) for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}"))]
    return {key_id(key): key for key in keys}


def sign(payload: bytes, payload_type: str, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the DSSE envelope of `payload`, as plain values for JSON."""
    signature = key.sign(pre_authentication(payload_type, payload))
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def verify(envelope: Mapping[str, Any], keys: PublicKeys) -> Signed:
    """Return what an envelope holds if one of its signatures is by a trusted key. Raises: SignatureError that says what is wrong.

    A signature that names no key is tried with every trusted one.
    """
    payload_type = envelope.get("payloadType")
    signatures = envelope.get("signatures")
    if not isinstance(payload_type, str) or not isinstance(signatures, list) or not signatures:
        raise SignatureError("this is no DSSE envelope: it needs payloadType, payload and at least one of signatures")
    payload = _decoded(envelope.get("payload"), "payload")
    message = pre_authentication(payload_type, payload)
    faults = []
    for entry in signatures:
        named = entry.get("keyid") if isinstance(entry, Mapping) else None
        signature = _decoded(entry.get("sig") if isinstance(entry, Mapping) else None, "sig")
        candidates = [named] if named else list(keys)
        for name in candidates:
            if name not in keys:
                faults.append(f"signed by {name}, which is not among the {len(keys)} trusted keys")
                continue
            try:
                keys[name].verify(signature, message)
            except InvalidSignature:
                faults.append(f"the signature by {name} does not fit: the payload, its type or the signature was changed")
            else:
                return Signed(payload, payload_type, name)
    raise SignatureError("; ".join(faults) or "the signature names no key and no key is trusted")


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: type and payload, each behind its length (DSSE's PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"cannot read the key {path}: {error.strerror}") from error


def _read_public(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"{path} is no public key in PEM form: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path} holds a {type(key).__name__}; trusted keys are Ed25519")
    return key


def _decoded(text: Any, name: str) -> bytes:
    """DSSE allows the ordinary and the URL-safe alphabet."""
    try:
        return base64.b64decode(str(text).replace("-", "+").replace("_", "/") if isinstance(text, str) else b"!", validate=True)
    except binascii.Error as error:
        raise SignatureError(f"the envelope's {name} is not base64") from error
