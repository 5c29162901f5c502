"""Who did what: events in a chain, each of which covers the one before it.

An event's hash is the SHA-256 of its canonical JSON together with the hash of the event before, so that none can be changed or
taken out of the middle unseen. Payloads hold digests, numbers and names of adapters, never a person's data.
"""

import hashlib
import json
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.registry.columns import now
from luthier.registry.database import take_lock
from luthier.registry.schema import AuditEvent

BEGINNING = "0" * 64
"""What stands where the first event names the one before it."""


def record(session: Session, actor: str, action: str, subject: str, payload: dict[str, Any] | None = None) -> AuditEvent:
    """Add an event to the chain, in the transaction of what it tells about. Call it last: others wait for its end.

    `subject` is what it happened to ("adapter/orders/3", "surface/shop"), `payload` plain JSON.
    """
    take_lock(session, "audit")
    last = session.scalar(select(AuditEvent.hash).order_by(AuditEvent.id.desc()).limit(1))
    event = AuditEvent(
        created_at=now(), actor=actor, action=action, subject=subject, payload=payload or {}, previous_hash=last or BEGINNING
    )
    event.hash = event_hash(event)
    session.add(event)
    session.flush()
    return event


def event_hash(event: AuditEvent) -> str:
    """Return the hash that an event must have."""
    told = [event.previous_hash, event.created_at.isoformat(), event.actor, event.action, event.subject, event.payload]
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()
