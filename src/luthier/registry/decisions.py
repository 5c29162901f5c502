"""What was found out about a version: the gate's reports, and scores on suites. Both come as JSON from the rooms above.

A report is kept as the bytes it came in, so that what a person reads later is what the gate wrote. Blob first, row second.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import RefusedError, RegistryError
from luthier.registry.audit import record
from luthier.registry.columns import Verdict, now
from luthier.registry.database import take_lock
from luthier.registry.keeping import keep_blob
from luthier.registry.place import Registry
from luthier.registry.schema import BaseModel, EvalRun, GateDecision
from luthier.registry.surfaces import subject
from luthier.registry.versions import find_version, name_of

REPORT_FORMAT = 1
CLOCKS_DIFFER = timedelta(minutes=5)
"""How far in the future a decision may be dated by another machine's clock."""


def record_gate(registry: Registry, version: str, report: bytes, *, actor: str, base: str | None = None) -> GateDecision:
    """Keep the gate's report (JSON) on a version, as the bytes it came in.

    `base` is the fingerprint digest of the base that it was judged on; by default the one the version was trained on. The
    decision is as old as the report says, so an old report cannot outlive a newer one by being kept again.
    Raises: RegistryError if it is no such report, RefusedError if it is about other bytes.
    """
    told = _report(report)
    policy, candidate = told["policy"], told["candidate"]
    with registry.database.writing() as session:
        chosen = find_version(session, version)
        if candidate["manifest_digest"] != chosen.manifest_digest:
            raise RefusedError(
                f"the report judges {candidate['manifest_digest'][:16]}, and {name_of(chosen)} is {chosen.manifest_digest[:16]}: "
                "it is about another adapter. Judge this one"
            )
        decision = GateDecision(
            version_id=chosen.id,
            manifest_digest=chosen.manifest_digest,
            base_model_id=_base_id(session, base) if base else chosen.base_model_id,
            baseline=_name_of_baseline(told["baseline"]),
            policy=policy["name"],
            policy_digest=policy["digest"],
            verdict=Verdict(told["verdict"]),
            report_digest=_keep(registry, session, report),
            created_at=_moment(told["decided_at"]),
            created_by=actor,
        )
        session.add(decision)
        session.flush()
        payload = {"verdict": decision.verdict, "policy_digest": decision.policy_digest, "report_digest": decision.report_digest}
        record(session, actor, "version.judge", subject(chosen), payload)
        return decision


def record_eval(
    registry: Registry,
    version: str,
    scores: Mapping[str, Any],
    *,
    actor: str,
    base: str | None = None,
    dtype: str | None = None,
    quantization: str | None = None,
) -> EvalRun:
    """Keep a version's scores on one suite, as evaluate's `SuiteScores.as_dict` gives them; the items go into a blob.

    `base` is the fingerprint digest of the base that was evaluated; by default the one the version was trained on.
    Raises: RegistryError if these are no such scores.
    """
    missing = [key for key in ("suite", "digest", "kind", "metric", "items") if key not in scores]
    if missing or not scores["items"]:
        raise RegistryError(f"these are not the scores of a suite: {', '.join(missing) or 'items'} missing")
    items = scores["items"]
    with registry.database.writing() as session:
        chosen = find_version(session, version)
        run = EvalRun(
            version_id=chosen.id,
            base_model_id=_base_id(session, base) if base else chosen.base_model_id,
            suite=scores["suite"],
            suite_digest=scores["digest"],
            dtype=dtype,
            quantization=quantization,
            metrics={
                "kind": scores["kind"],
                "num_items": len(items),
                scores["metric"]: sum(item["score"] for item in items) / len(items),
            },
            scores_digest=_keep(registry, session, json.dumps(scores, sort_keys=True).encode()),
        )
        session.add(run)
        session.flush()
        payload = {"suite": run.suite, "suite_digest": run.suite_digest, "scores_digest": run.scores_digest}
        record(session, actor, "version.evaluate", subject(chosen), payload)
        return run


def _report(report: bytes) -> dict[str, Any]:
    """The gate's report with every key that is needed here. Raises: RegistryError that lists what is wrong."""
    try:
        told = json.loads(report)
    except ValueError as error:
        raise RegistryError(f"the gate's report is not JSON: {error}") from error
    faults = []
    if not isinstance(told, dict) or told.get("format") != REPORT_FORMAT:
        raise RegistryError(f"this is no gate report of format {REPORT_FORMAT}")
    if told.get("verdict") not in list(Verdict):
        faults.append(f"verdict is {told.get('verdict')!r}, needed {', '.join(Verdict)}")
    for group, key in (("policy", "name"), ("policy", "digest"), ("candidate", "manifest_digest")):
        if not isinstance(told.get(group), dict) or not isinstance(told[group].get(key), str):
            faults.append(f"{group}.{key} is missing")
    faults += [f"{key} is missing" for key in ("baseline", "decided_at") if not told.get(key)]
    if faults:
        raise RegistryError("the gate's report cannot be kept:" + "".join(f"\n  {fault}" for fault in faults))
    return told


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise RegistryError(f"the gate's report says it was decided at {text!r}; needed an ISO moment with its zone") from error
    if moment.tzinfo is None or moment > now() + CLOCKS_DIFFER:
        raise RegistryError(f"the gate's report says it was decided at {text}; needed a moment with its zone, not in the future")
    return moment


def _name_of_baseline(baseline: Any) -> str:
    """The report names the base or the incumbent, in one word or with its digest beside it."""
    return str(baseline.get("name", "base") if isinstance(baseline, dict) else baseline)


def _base_id(session: Session, fingerprint_digest: str) -> int:
    found = session.scalar(select(BaseModel.id).where(BaseModel.fingerprint_digest == fingerprint_digest))
    if found is None:
        raise RegistryError(f"No base model of the registry has the fingerprint {fingerprint_digest}")
    return found


def _keep(registry: Registry, session: Session, data: bytes) -> str:
    take_lock(session, "blobs", shared=True)  # no sweeper runs until this session ends: what is put now stays
    digest, size = registry.blobs.put_bytes(data)
    keep_blob(session, registry.blobs, digest, size)
    return digest
