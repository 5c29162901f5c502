"""The certificate of an erasure: what was deleted, what could not be, what was decided, signed."""

import json
from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, SignatureError
from luthier.registry.columns import DataState, Lifecycle, now
from luthier.registry.erasing.items import Decision, State, items, locked, move
from luthier.registry.place import Registry
from luthier.registry.schema import AdapterVersion, AuditEvent, Blocked, DatasetVersion, ErasureItem, ErasureRequest, Signature
from luthier.registry.signing import PublicKeys, key_id, sign, verify

PAYLOAD_TYPE = "application/vnd.luthier.erasure-certificate+json"
FORMAT = 1


def certify(registry: Registry, number: int, key: Ed25519PrivateKey, *, actor: str) -> dict[str, Any]:
    """Sign what a verified erasure did, keep the envelope and return it; one that is certified is returned as it is.

    The holds of versions that were exempted are lifted, and the traces are dropped. Raises: RefusedError before it is verified.
    """
    with registry.database.writing() as session:
        request = locked(session, number)
        if request.state == State.CERTIFIED and request.certificate:
            return request.certificate
        if request.state != State.VERIFIED:
            raise RefusedError(
                f"Erasure {number} is {request.state}, not verified; go on with: luthier registry erase resume {number}"
            )
        found = items(session, number)
        payload = _payload(session, registry, request, found, actor)
        text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        request.certificate = sign(text, PAYLOAD_TYPE, key)
        session.add(Signature(digest=request.target_digest, key_id=key_id(key.public_key()), envelope=request.certificate))
        for item in found:
            if item.kind == "version" and item.decision == Decision.EXEMPT:
                session.get_one(AdapterVersion, item.evidence["id"]).hold_reason = item.evidence["held"]
                item.state = "done"
            if item.kind == "traces":
                item.evidence, item.state = {"num_traces": len(item.evidence["traces"])}, "done"
        move(session, request, State.CERTIFIED, actor)
        return request.certificate


def read_certificate(envelope: Mapping[str, Any], keys: PublicKeys) -> dict[str, Any]:
    """Return what a certificate says, if a trusted key signed it. Raises: SignatureError."""
    signed = verify(envelope, keys)
    if signed.payload_type != PAYLOAD_TYPE:
        raise SignatureError(f"this is signed, but it is no certificate of an erasure: {signed.payload_type}")
    payload: dict[str, Any] = json.loads(signed.payload)
    return payload


def check_certificate(registry: Registry, payload: Mapping[str, Any]) -> list[str]:
    """Return where the registry does not look as the certificate says, for instance after a backup was restored."""
    faults = [f"blob {one['digest']} is stored" for one in payload["blobs"] if registry.blobs.size(one["digest"]) is not None]
    with registry.database.reading() as session:
        blocked = set(session.scalars(select(Blocked.digest)))
        faults += [f"{digest} is not blocked" for digest in payload["blocked"] if digest not in blocked]
        for one in payload["versions"]:
            version = session.scalar(select(AdapterVersion).filter_by(id=one["id"], manifest_digest=one["manifest_digest"]))
            if one["decision"] != Decision.EXEMPT and (version is None or version.lifecycle is not Lifecycle.ERASED):
                faults.append(f"{one['name']} is not erased")
        for one in payload["data"]:
            data = session.scalar(select(DatasetVersion).filter_by(id=one["id"], digest=one["digest"]))
            if data is None or data.state is not DataState.ERASED:
                faults.append(f"{one['name']} is not erased")
    return faults


def _payload(
    session: Session, registry: Registry, request: ErasureRequest, found: list[ErasureItem], actor: str
) -> dict[str, Any]:
    def of(kind: str, *states: str) -> list[ErasureItem]:
        return sorted((one for one in found if one.kind == kind and one.state in states), key=lambda one: one.target)

    decided = ("id", "manifest_digest", "reason", "approver", "replacement", "decided_by")
    (search,) = of("search", "done")
    return {
        "format": FORMAT,
        "erasure": request.id,
        "kind": request.kind,
        "target": request.target_digest,
        "reference": request.reference,
        "received_at": request.created_at.isoformat(),
        "received_by": request.created_by,
        "certified_at": now().isoformat(),
        "certified_by": actor,
        "data": [{"name": one.target, "id": one.evidence["id"], "digest": one.evidence["digest"]} for one in of("data", "done")],
        "versions": [
            {"name": one.target, "decision": one.decision} | {word: one.evidence.get(word) for word in decided}
            for one in of("version", "done", "open")
        ],
        "deployments": [
            {"what": one.target, "is_acknowledgement_assumed": one.evidence.get("is_assumed", False)}
            for one in of("deployment", "done")
        ],
        "blobs": [{"digest": one.target, "what": one.evidence["what"], "of": one.evidence["of"]} for one in of("blob", "done")],
        "copies": [{"location": one.target, "kind": one.evidence["kind"]} for one in of("copy", "done")],
        "not_deleted": [
            *({"what": one.target, "why": one.evidence["why"]} for one in of("copy", "external")),
            *({"what": f"blob {one.target}", "why": "a version that stays has the same file"} for one in of("blob", "kept")),
            *(_beyond(registry)),
        ],
        "blocked": sorted(session.scalars(select(Blocked.digest).where(Blocked.request_id == request.id))),
        "search": search.evidence,
        "audit_head": session.scalar(select(AuditEvent.hash).order_by(AuditEvent.id.desc()).limit(1)),
    }


def _beyond(registry: Registry) -> list[dict[str, str]]:
    """What no erasure reaches from here."""
    told = [{"what": "backups of the registry and of its blobs", "why": "external, needs acknowledgement"}]
    if not registry.database.is_sqlite:
        told.append({"what": "PostgreSQL's write-ahead log and replicas", "why": "external, needs acknowledgement"})
    return told
