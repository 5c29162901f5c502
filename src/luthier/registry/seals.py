"""Signatures over versions: a statement with the manifest's digest, in the form that in-toto gave such statements.

A statement names the version and the SHA-256 of its manifest, which names the SHA-256 of every file: who signs the one vouches
for all bytes. Source: in-toto attestation, Statement v1.
"""

import json
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import SignatureError
from luthier.registry.audit import record
from luthier.registry.manifest import canonical_json
from luthier.registry.schema import AdapterVersion, Signature
from luthier.registry.signing import PublicKeys, Signed, key_id, sign, verify
from luthier.registry.surfaces import subject
from luthier.registry.versions import name_of

STATEMENT = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE = "urn:luthier:adapter-version:1"


def seal(session: Session, version: AdapterVersion, key: Ed25519PrivateKey, *, actor: str) -> dict[str, Any]:
    """Sign a version's manifest, keep the envelope and return it."""
    name = key_id(key.public_key())
    envelope = sign(canonical_json(_statement(version)), PAYLOAD_TYPE, key)
    session.add(Signature(digest=version.manifest_digest, key_id=name, envelope=envelope))
    record(session, actor, "version.sign", subject(version), {"key": name, "manifest_digest": version.manifest_digest})
    return envelope


def check_seals(session: Session, version: AdapterVersion, keys: PublicKeys) -> Signed:
    """Return the first kept signature by a trusted key that is over this very version.

    Raises: SignatureError that says what is wrong with each, or that there is none.
    """
    faults = []
    for kept in _signatures(session, version):
        try:
            signed = verify(kept.envelope, keys)
        except SignatureError as error:
            faults.append(str(error))
            continue
        if signed.payload_type == PAYLOAD_TYPE and json.loads(signed.payload) == _statement(version):
            return signed
        faults.append(f"the signature by {signed.key_id} is over something else")
    unsigned = f"{name_of(version)} is not signed; sign it with: luthier registry sign {name_of(version)}"
    raise SignatureError("; ".join(faults) or unsigned)


def sealed_by(keys: PublicKeys) -> Callable[[Session, AdapterVersion], Signed]:
    """Return the check by these keys, in the form that `verify` takes."""
    return lambda session, version: check_seals(session, version, keys)


def _signatures(session: Session, version: AdapterVersion) -> list[Signature]:
    query = select(Signature).where(Signature.digest == version.manifest_digest).order_by(Signature.id)
    return list(session.scalars(query))


def _statement(version: AdapterVersion) -> dict[str, Any]:
    """The same bytes may be registered under two names; a signature is over one of them."""
    return {
        "_type": STATEMENT,
        "subject": [{"name": name_of(version), "digest": {"sha256": version.manifest_digest}}],
        "predicateType": PREDICATE,
        "predicate": {},
    }
