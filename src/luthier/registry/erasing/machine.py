"""Erasure of a data set or of a person's rows: of the data, of all that learned from it, and of every copy.

    received    the duty is noted
    frozen      the data is frozen and every affected version is held, in one transaction
    planned     what has to go is listed; for each version somebody decides: erase, retrain or exempt
    undeployed  nothing affected is served any more, and the servers have said so
    deleting    the rows are tombstones, digests are blocked; bytes are being deleted, item by item
    verified    nothing of it was found in the store, the database's files and the caches
    certified   signed: what was deleted, what could not be

Each step is a transaction or can be done twice, so whoever is killed anywhere resumes with the same end. A tombstone keeps a
version's number, digests, dates and what was decided; its lineage stays too, which is how a later question finds it erased.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, RegistryError
from luthier.registry import audit
from luthier.registry.columns import DataState, Lifecycle, now
from luthier.registry.erasing.items import (
    Decision,
    State,
    find_request,
    going,
    items,
    locked,
    move,
    put,
    replacement_faults,
    tell,
)
from luthier.registry.erasing.proof import search_all, take_traces
from luthier.registry.erasing.reach import Target, plan
from luthier.registry.erasing.removal import compact, remove, unneeded
from luthier.registry.place import Registry
from luthier.registry.schema import (
    Adapter,
    AdapterFile,
    AdapterVersion,
    Alias,
    Approval,
    Blocked,
    CopyElsewhere,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    ErasureItem,
    ErasureRequest,
    EvalRun,
    Outbox,
)

UNDECIDED_UNTIL = (State.RECEIVED, State.FROZEN, State.PLANNED)


def start(
    registry: Registry, target: Target, *, actor: str, reference: str | None = None, due_at: datetime | None = None, who: str = ""
) -> int:
    """Receive a duty to erase, freeze what it reaches and plan it; return its number. An open one of the same target goes on.

    `who` is the identifier of the person, where it is one: rows that hold it are what the search at the end looks for.
    Raises: RegistryError if nothing is known of the target.
    """
    with registry.database.writing() as session:
        open_now = select(ErasureRequest.id).filter_by(kind=target.kind, target_digest=target.digest)
        number = session.scalar(open_now.where(ErasureRequest.state != State.CERTIFIED))
        if number is None:
            if not plan(session, target).data:
                raise RegistryError("Nothing to erase: no data set here is known to hold that, or it is erased already.")
            request = ErasureRequest(
                kind=target.kind,
                target_digest=target.digest,
                reference=reference,
                state=State.RECEIVED,
                due_at=due_at,
                created_by=actor,
            )
            session.add(request)
            session.flush()
            number = request.id
            tell(session, request, actor)
    _go_on(registry, number, actor, until=State.PLANNED, who=who)
    return number


def decide(
    registry: Registry,
    number: int,
    version: str,
    decision: Decision,
    *,
    actor: str,
    reason: str | None = None,
    approver: str | None = None,
    replacement: str | None = None,
) -> None:
    """Say what happens to an affected version; without a word it is erased.

    Retraining needs the new version as `replacement`, which must not be affected itself; an exemption a reason, and an approver
    who is not the one who asks. Raises: RefusedError, RegistryError.
    """
    with registry.database.writing() as session:
        request = find_request(session, number)
        item = session.scalar(select(ErasureItem).filter_by(request_id=number, kind="version", target=version))
        if item is None:
            raise RegistryError(f"Erasure {number} does not reach {version}; see: luthier registry erase status {number}")
        if request.state not in UNDECIDED_UNTIL:
            raise RefusedError(f"Erasure {number} is {request.state}; what happens to {version} cannot change any more.")
        faults = []
        if decision is Decision.EXEMPT and not (reason and approver):
            faults.append("an exemption needs a reason and an approver")
        if decision is Decision.EXEMPT and approver == actor:
            faults.append(f"{actor} cannot approve what {actor} asks for")
        if decision is Decision.RETRAIN:
            faults += replacement_faults(session, number, replacement)
        if faults:
            raise RefusedError(f"{version} stays to be erased:\n  " + "\n  ".join(faults))
        item.decision = decision
        told = {"reason": reason, "approver": approver, "replacement": replacement, "decided_by": actor}
        item.evidence = item.evidence | told
        digest = reason and audit.text_digest(reason)
        payload = {"version": version, "decision": decision.value, "replacement": replacement, "reason_digest": digest}
        audit.record(session, actor, "erasure.decided", f"erasure/{number}", payload)


def resume(registry: Registry, number: int, *, actor: str, assume_acknowledged: bool = False) -> State:
    """Carry an erasure on from wherever it stopped until it is verified; `certify` is the last step.

    Raises: RefusedError where it cannot go on: a server has not said that it let go, a blob is under a legal hold, something
    was found that should be gone. What was done stays done; call it again.
    """
    return _go_on(registry, number, actor, until=State.VERIFIED, assume_acknowledged=assume_acknowledged)


def status(session: Session, number: int) -> dict[str, Any]:
    """Return how far an erasure has come and where each item stands, as plain data. Raises: RegistryError."""
    request = find_request(session, number)
    return {
        "number": number,
        "kind": request.kind,
        "target": request.target_digest,
        "reference": request.reference,
        "state": request.state,
        "created_at": request.created_at,
        "created_by": request.created_by,
        "due_at": request.due_at,
        "items": [
            {"kind": item.kind, "target": item.target, "decision": item.decision, "state": item.state}
            for item in items(session, number)
            if item.kind != "traces"
        ],
    }


def all_requests(session: Session) -> list[dict[str, Any]]:
    """Return every erasure with its state, as plain data."""
    query = select(ErasureRequest).order_by(ErasureRequest.id)
    return [
        {"number": one.id, "kind": one.kind, "state": one.state, "reference": one.reference, "due_at": one.due_at}
        for one in session.scalars(query)
    ]


# --- the machine -------------------------------------------------------------------------------------------------


def _go_on(
    registry: Registry, number: int, actor: str, *, until: State, who: str = "", assume_acknowledged: bool = False
) -> State:
    order = list(State)
    while True:
        with registry.database.reading() as session:
            state = State(find_request(session, number).state)
        if order.index(state) >= order.index(until):
            return state
        if state is State.RECEIVED:
            with registry.database.writing() as session:
                request = locked(session, number)
                _freeze(session, request)
                move(session, request, State.FROZEN, actor)
        elif state is State.FROZEN:
            _planitems(registry, number, actor, who)
        elif state is State.PLANNED:
            _undeploy(registry, number, actor, assume_acknowledged)
        elif state is State.UNDEPLOYED:
            _bury(registry, number, actor)
        else:
            remove(registry, number)
            compact(registry)
            told = search_all(registry, number)
            with registry.database.writing() as session:
                request = locked(session, number)
                put(session, number, "search", "what was searched", told, state="done")
                move(session, request, State.VERIFIED, actor)


def _freeze(session: Session, request: ErasureRequest) -> bool:
    """Freeze the data and hold the versions that the request reaches now; return whether any were new."""
    found = plan(session, Target(request.kind, request.target_digest))
    known = {(item.kind, item.target) for item in items(session, request.id)}
    for data in found.data:
        put(session, request.id, "data", f"{data.name}:{data.version}", {"id": data.id, "digest": data.digest})
    contents, versions = [one.id for one in found.data], [one.id for one in found.versions]
    session.execute(update(DatasetVersion).where(DatasetVersion.id.in_(contents)).values(state=DataState.FROZEN))
    for one in found.versions:
        told = {"id": one.id, "manifest_digest": one.manifest_digest, "is_direct": one.is_direct, "held": one.hold_reason}
        put(session, request.id, "version", f"{one.name}:{one.version}", told)
    held = f"being erased (erasure {request.id})"
    session.execute(update(AdapterVersion).where(AdapterVersion.id.in_(versions)).values(hold_reason=held))
    session.flush()
    return {(item.kind, item.target) for item in items(session, request.id)} != known


def _planitems(registry: Registry, number: int, actor: str, who: str) -> None:
    with registry.database.reading() as session:
        request = find_request(session, number)
        found = plan(session, Target(request.kind, request.target_digest))
        traces = take_traces(registry, session, found, who if request.kind == "subject" else None)
    with registry.database.writing() as session:
        request = locked(session, number)
        if _freeze(session, request):  # somebody registered meanwhile: list and read again
            tell(session, request, actor)
            return
        for deployment_id, what in found.deployments.items():
            put(session, number, "deployment", f"{deployment_id}: {what}", {"id": deployment_id})
        for digest, told in found.blobs.items():
            put(session, number, "blob", digest, told)
        for location, told in found.copies.items():
            put(session, number, "copy", location, told)
        put(session, number, "traces", "traces", {"traces": sorted(traces)})
        move(session, request, State.PLANNED, actor)


def _undeploy(registry: Registry, number: int, actor: str, assume_acknowledged: bool) -> None:
    with registry.database.writing() as session:
        request = locked(session, number)
        if _freeze(session, request):
            move(session, request, State.FROZEN, actor)
            return
        faults = [
            f"{item.target}: {fault}"
            for item in items(session, number, "version")
            if item.decision == Decision.RETRAIN
            for fault in replacement_faults(session, number, item.evidence["replacement"])
        ]
        if faults:
            raise RefusedError(f"Erasure {number} waits for what takes the place of versions:\n  " + "\n  ".join(faults))
        names = {item.evidence["id"]: item.target for item in going(session, number)}
        session.execute(delete(Alias).where(Alias.version_id.in_(list(names))))
        waiting: list[str] = []
        drained: list[tuple[str, dict[str, Any]]] = []
        query = select(Deployment).where(Deployment.version_id.in_(list(names)), Deployment.acknowledged_at.is_(None))
        for deployment in session.scalars(query.order_by(Deployment.id)):
            what = f"{names[deployment.version_id]} on {deployment.surface.name}"
            if deployment.ended_at is None:
                deployment.ended_at = now()
                payload = {"surface": deployment.surface.name, "version": None, "before": names[deployment.version_id]}
                session.add(Outbox(event="surface.undeployed", payload=payload))
                drained.append((deployment.surface.name, payload))
            if assume_acknowledged:
                deployment.acknowledged_at = now()
            else:
                waiting.append(what)
            item = put(session, number, "deployment", f"{deployment.id}: {what}", {"id": deployment.id})
            item.evidence = item.evidence | {"is_assumed": assume_acknowledged}
        for name, payload in drained:
            audit.record(session, actor, "surface.drain", f"surface/{name}", payload)
        if not waiting:
            for item in items(session, number, "deployment"):
                item.state = "done"
            move(session, request, State.UNDEPLOYED, actor)
    if waiting:
        raise RefusedError(
            f"Erasure {number} waits until servers say that they no longer hold these:\n  "
            + "\n  ".join(waiting)
            + "\nResume it then; with --assume-acknowledged if there is no server that could say so."
        )


def _bury(registry: Registry, number: int, actor: str) -> None:
    """Make tombstones of the versions and the data, and block their digests: one transaction."""
    with registry.database.writing() as session:
        request = locked(session, number)
        dying = {item.evidence["id"]: item for item in going(session, number)}
        data = {item.evidence["id"]: item.evidence["digest"] for item in items(session, number, "data")}
        versions, contents, digests = list(dying), list(data), list(data.values())
        session.execute(delete(AdapterFile).where(AdapterFile.version_id.in_(versions)))
        of_them = EvalRun.version_id.in_(versions) | EvalRun.suite_digest.in_(digests)
        session.execute(update(EvalRun).where(of_them).values(scores_digest=None, metrics={}))
        session.execute(update(Approval).where(Approval.version_id.in_(versions)).values(comment=""))
        session.execute(update(Deployment).where(Deployment.version_id.in_(versions)).values(forced_reason=None))
        for version in session.scalars(select(AdapterVersion).where(AdapterVersion.id.in_(versions))):
            _drop_texts(version)
            version.hold_reason = f"erased (erasure {number})"
        session.flush()
        alive = select(AdapterVersion.adapter_id).where(AdapterVersion.lifecycle != Lifecycle.ERASED)
        touched = select(AdapterVersion.adapter_id).where(AdapterVersion.id.in_(versions))
        session.execute(update(Adapter).where(Adapter.id.in_(touched), Adapter.id.not_in(alive)).values(description=""))
        session.execute(delete(DatasetSubject).where(DatasetSubject.dataset_version_id.in_(contents)))
        copies = CopyElsewhere.version_id.in_(versions) | CopyElsewhere.dataset_version_id.in_(contents)
        session.execute(delete(CopyElsewhere).where(copies))
        gone = update(DatasetVersion).where(DatasetVersion.id.in_(contents))
        session.execute(gone.values(state=DataState.ERASED, location=None))
        staying = set(session.scalars(select(AdapterVersion.manifest_digest).where(AdapterVersion.lifecycle != Lifecycle.ERASED)))
        manifests = {item.evidence["manifest_digest"] for item in dying.values()} - staying
        weights = [item.target for item in items(session, number, "blob") if item.evidence["is_weights"]]
        for digest in {request.target_digest, *digests, *manifests, *unneeded(session, weights)}:
            if session.get(Blocked, digest) is None:
                session.add(Blocked(digest=digest, request_id=number))
        for item in [*dying.values(), *items(session, number, "data")]:
            item.decision, item.state = item.decision or Decision.ERASE, "done"
        move(session, request, State.DELETING, actor)


def _drop_texts(version: AdapterVersion) -> None:
    version.lifecycle = Lifecycle.ERASED
    version.license = version.intended_use = version.limitations = version.consent = None
    version.no_data_reason = version.run_id = None
    version.recipe, version.metrics, version.environment, version.target_modules = {}, {}, {}, []
