"""Who did what: events in a chain, each of which covers the one before it.

An event's hash is the SHA-256 of its canonical JSON together with the hash of the event before, so that none can be changed or
taken out of the middle unseen. Events cut off at the end leave a chain that holds: whoever wants to see that too keeps the hash
of the last event (`ChainReport.head`) elsewhere, and asks for it.

An event can never be erased, so payloads hold digests, numbers and names of adapters, never a person's data. Free text (why a
rule was overruled, why a version is held) stays in its own row, where an erasure finds it; the payload has its digest.
"""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import RegistryError
from luthier.registry.columns import now
from luthier.registry.database import take_lock
from luthier.registry.manifest import digest_of
from luthier.registry.schema import AuditEvent

BEGINNING = "0" * 64
"""What stands where the first event names the one before it."""
LONGEST_TEXT = 300
"""Names, paths and digests are shorter; what is longer was written by somebody about something."""
_MAIL = re.compile(r"[^\s@/]+@[^\s@/]+\.[A-Za-z]{2,}")


@dataclass(frozen=True)
class ChainFault:
    """An event that does not fit the chain, and how."""

    event_id: int
    what: str


@dataclass(frozen=True)
class ChainReport:
    """What `check_chain` found: the number of events, the hash of the last, and every place where the chain breaks."""

    num_events: int
    head: str
    faults: tuple[ChainFault, ...]


def record(session: Session, actor: str, action: str, subject: str, payload: dict[str, Any] | None = None) -> AuditEvent:
    """Add an event to the chain, in the transaction of what it tells about. Call it last: others wait for its end.

    `subject` is what it happened to ("adapter/orders/3", "surface/shop"), `payload` plain JSON.
    Raises: RegistryError if the payload holds free text or an e-mail address, since no erasure could take it out again.
    """
    payload = payload or {}
    _refuse_people(payload)
    take_lock(session, "audit")
    last = session.scalar(select(AuditEvent.hash).order_by(AuditEvent.id.desc()).limit(1))
    event = AuditEvent(
        created_at=now(), actor=actor, action=action, subject=subject, payload=payload, previous_hash=last or BEGINNING
    )
    event.hash = event_hash(event)
    session.add(event)
    session.flush()
    return event


def event_hash(event: AuditEvent) -> str:
    """Return the hash that an event must have."""
    moment = event.created_at.astimezone(UTC).isoformat()  # a server gives moments in the zone of the connection
    told = [event.previous_hash, moment, event.actor, event.action, event.subject, event.payload]
    return digest_of(told)


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text: what a payload holds where the text itself may have to be erased one day."""
    return hashlib.sha256(text.encode()).hexdigest()


def events(
    session: Session,
    *,
    actor: str | None = None,
    action: str | None = None,
    subject: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    limit: int | None = None,
) -> list[AuditEvent]:
    """Return the events that fit all filters, oldest first; with `limit`, the last ones.

    `action` and `subject` also find what lies below them: "adapter/orders" finds "adapter/orders/3".
    """
    query = select(AuditEvent)
    if actor is not None:
        query = query.where(AuditEvent.actor == actor)
    if action is not None:
        below = AuditEvent.action.startswith(f"{action}.", autoescape=True)
        query = query.where((AuditEvent.action == action) | below)
    if subject is not None:
        below = AuditEvent.subject.startswith(f"{subject}/", autoescape=True)
        query = query.where((AuditEvent.subject == subject) | below)
    if since is not None:
        query = query.where(AuditEvent.created_at >= since)
    if until is not None:
        query = query.where(AuditEvent.created_at < until)
    return list(session.scalars(query.order_by(AuditEvent.id.desc()).limit(limit)))[::-1]


def check_chain(session: Session, *, head: str | None = None) -> ChainReport:
    """Compute every event's hash again and return where the chain breaks.

    `head` is a hash that was noted earlier as the last one: if the chain does not hold it, events were cut off or written anew.
    """
    faults: list[ChainFault] = []
    previous, num_events, last_id, met = BEGINNING, 0, 0, head in (None, BEGINNING)
    for event in session.scalars(select(AuditEvent).order_by(AuditEvent.id).execution_options(yield_per=1000)):
        if event.previous_hash != previous:
            where = f"after event {last_id}" if last_id else "at the beginning"
            faults.append(ChainFault(event.id, f"does not follow the event before it: something {where} was taken out or added"))
        if event_hash(event) != event.hash:
            faults.append(ChainFault(event.id, "was changed: its hash is not that of its content"))
        previous, last_id = event.hash, event.id
        num_events += 1
        met = met or event.hash == head
    if not met:
        faults.append(ChainFault(last_id, f"is the last one, and {head} was never reached: events were cut off or written anew"))
    return ChainReport(num_events, previous, tuple(faults))


def _refuse_people(payload: dict[str, Any]) -> None:
    faults = []
    for text in _texts(payload):
        if len(text) > LONGEST_TEXT or "\n" in text:
            faults.append(f"a text of {len(text)} characters ({text[:30]!r}...); put its digest there")
        elif found := _MAIL.search(text):
            faults.append(f"what looks like an e-mail address ({found[0]!r})")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise RegistryError(f"An audit event cannot be erased, so its payload may not hold:{listed}")


def _texts(value: Any) -> list[str]:
    """Every string in plain JSON, keys too."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in [str(key), *_texts(inner)]]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return []
