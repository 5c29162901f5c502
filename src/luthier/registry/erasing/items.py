"""The items of an erasure: what it has to deal with, one row each, and where each stands."""

import enum
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.core.errors import RegistryError
from luthier.registry import audit
from luthier.registry.columns import Lifecycle
from luthier.registry.database import take_lock
from luthier.registry.schema import Adapter, AdapterVersion, ErasureItem, ErasureRequest


class State(enum.StrEnum):
    """How far an erasure has come."""

    RECEIVED = "received"
    FROZEN = "frozen"
    PLANNED = "planned"
    UNDEPLOYED = "undeployed"
    DELETING = "deleting"
    VERIFIED = "verified"
    CERTIFIED = "certified"


class Decision(enum.StrEnum):
    """What happens to an affected version."""

    ERASE = "erase"
    RETRAIN = "retrain"
    EXEMPT = "exempt"


def find_request(session: Session, number: int) -> ErasureRequest:
    """Return an erasure by its number. Raises: RegistryError."""
    request = session.get(ErasureRequest, number)
    if request is None:
        raise RegistryError(f"There is no erasure {number}; list them with: luthier registry erase status")
    return request


def locked(session: Session, number: int) -> ErasureRequest:
    """Return the request, with nobody registering or deploying until the transaction ends."""
    take_lock(session, "register")
    take_lock(session, "serving")
    return session.scalars(select(ErasureRequest).filter_by(id=number).with_for_update()).one()


def move(session: Session, request: ErasureRequest, state: State, actor: str) -> None:
    """Enter a state, and tell the audit chain."""
    request.state = state
    session.flush()
    tell(session, request, actor)


def tell(session: Session, request: ErasureRequest, actor: str) -> None:
    """Record the state of an erasure, with the number of its items."""
    found = select(ErasureItem.kind, func.count()).where(ErasureItem.request_id == request.id).group_by(ErasureItem.kind)
    counts = {row[0]: row[1] for row in session.execute(found)}
    payload = {"kind": request.kind, "target": request.target_digest, "items": counts}
    audit.record(session, actor, f"erasure.{request.state}", f"erasure/{request.id}", payload)


def items(session: Session, number: int, kind: str | None = None) -> list[ErasureItem]:
    """Return the items of an erasure, or those of a kind."""
    query = select(ErasureItem).filter_by(request_id=number).order_by(ErasureItem.id)
    return list(session.scalars(query if kind is None else query.filter_by(kind=kind)))


def going(session: Session, number: int) -> list[ErasureItem]:
    """Return the versions that do not stay."""
    return [item for item in items(session, number, "version") if item.decision != Decision.EXEMPT]


def put(session: Session, number: int, kind: str, target: str, evidence: dict[str, Any], *, state: str = "open") -> ErasureItem:
    """Return the item of this kind and target, added where it is not there yet."""
    item = session.scalar(select(ErasureItem).filter_by(request_id=number, kind=kind, target=target))
    if item is None:
        item = ErasureItem(request_id=number, kind=kind, target=target, state=state, evidence=evidence)
        session.add(item)
        session.flush()
    return item


def replacement_faults(session: Session, number: int, replacement: str | None) -> list[str]:
    """Return what speaks against a version as the one that takes an affected one's place."""
    if not replacement:
        return ["retraining needs the new version: --replacement NAME:VERSION"]
    name, _, digits = replacement.rpartition(":")
    query = select(AdapterVersion).join(Adapter).where(Adapter.name == name, AdapterVersion.version == int(digits or 0))
    version = session.scalar(query)
    if version is None:
        return [f"there is no {replacement}; retrain without the rows, and register that first"]
    if session.scalar(select(ErasureItem.id).filter_by(request_id=number, kind="version", target=replacement)):
        return [f"{replacement} is affected itself"]
    if version.lifecycle is not Lifecycle.CANDIDATE or version.hold_reason:
        return [f"{replacement} is {version.hold_reason or version.lifecycle}"]
    return []
