"""What stands between a version and a surface: every rule that is not met, each with the sentence that says what to do.

Nothing here changes anything. A damaged, held or retired version cannot be forced through; what people and the gate have not said
yet can, with a reason that stays visible wherever the deployment is listed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from luthier.core.errors import SignatureError
from luthier.formats.fingerprint import Comparison, Fingerprint, compare
from luthier.formats.fingerprint import Verdict as BaseVerdict
from luthier.registry.columns import Lifecycle, Verdict, now
from luthier.registry.place import Registry
from luthier.registry.schema import AdapterVersion, BaseModel, EvalRun, GateDecision, Surface
from luthier.registry.seals import check_seals
from luthier.registry.signing import PublicKeys
from luthier.registry.surfaces import SurfaceRules, rules_of, standing_words
from luthier.registry.verifying import Status, verify
from luthier.registry.versions import name_of

HARD = frozenset({"lifecycle", "hold", "bytes", "current", "experiment"})
"""Rules that no reason overrules."""


@dataclass(frozen=True)
class Unmet:
    """A rule that is not met, by its name, and what would have to be true."""

    rule: str
    what: str

    @property
    def can_be_forced(self) -> bool:
        return self.rule not in HARD


@dataclass(frozen=True)
class Findings:
    """What stands in the way of a version, what is only said, and what its base is to the one served."""

    unmet: tuple[Unmet, ...]
    warnings: tuple[str, ...]
    base_verdict: BaseVerdict


def damaged_files(registry: Registry, version: str) -> list[str]:
    """Read every file of a version and return what `verify` finds wrong with it. Takes no lock."""
    return [f"{check.name}: {check.told}" for check in verify(registry, version).checks if check.status is not Status.OK]


def unmet_conditions(
    session: Session, version: AdapterVersion, surface: Surface, *, damaged: Sequence[str] = (), keys: PublicKeys | None = None
) -> Findings:
    """Return everything that stands between a version and a surface.

    `damaged` is what `damaged_files` found, `keys` are those trusted to sign (for surfaces whose rules ask for a signature).
    """
    rules = rules_of(surface)
    unmet = _of_itself(version, damaged)
    base, compared = served_base(session, version, rules)
    if fault := _base_fault(session, version, base, compared):
        unmet.append(fault)
    gate_faults, warnings = _of_the_gate(session, version, base, rules)
    unmet += [*gate_faults, *_of_people(session, version, surface, rules)]
    if rules.signature:
        try:
            check_seals(session, version, keys or {})
        except SignatureError as error:
            unmet.append(Unmet("signature", str(error)))
    return Findings(tuple(unmet), tuple(warnings), compared.verdict)


def unmet_for_return(
    session: Session, version: AdapterVersion, surface: Surface, *, damaged: Sequence[str] = ()
) -> tuple[Unmet, ...]:
    """Return what stands in the way of a version that has served here before: its own state and its base, nothing else."""
    fault = _base_fault(session, version, *served_base(session, version, rules_of(surface)))
    return tuple(_of_itself(version, damaged) + ([fault] if fault else []))


def served_base(session: Session, version: AdapterVersion, rules: SurfaceRules) -> tuple[BaseModel | None, Comparison]:
    """Return the base model that the surface serves, and what it is to the one that the version was trained on."""
    own = version.base_model
    if rules.base is None or (own is not None and own.fingerprint_digest == rules.base):
        if own is None:
            return None, Comparison(BaseVerdict.UNKNOWN, "no base model was recorded for it")
        return own, Comparison(BaseVerdict.EXACT, "the base it was trained on")
    served = session.scalars(select(BaseModel).where(BaseModel.fingerprint_digest == rules.base)).one()
    if own is None:
        return served, Comparison(BaseVerdict.UNKNOWN, "no base model was recorded for it")
    recorded, here = recorded_fingerprint(own), recorded_fingerprint(served)
    if recorded is None or here is None:
        compared = Comparison(BaseVerdict.UNKNOWN, "one of the two was registered without a whole fingerprint")
    else:
        compared = compare(recorded, here)
    if compared.verdict in (BaseVerdict.UNKNOWN, BaseVerdict.MISMATCH) and served.derived_from_id == own.id:
        return served, Comparison(BaseVerdict.DECLARED, f"registered as {served.derivation or 'derived'} from {own.name}")
    return served, compared


def _of_itself(version: AdapterVersion, damaged: Sequence[str]) -> list[Unmet]:
    unmet = []
    if version.lifecycle != Lifecycle.CANDIDATE:
        unmet.append(Unmet("lifecycle", f"it is {version.lifecycle}, and does not come back; register the adapter again"))
    if version.hold_reason is not None:
        unmet.append(Unmet("hold", f"it is held ({version.hold_reason}); release it first"))
    return unmet + [Unmet("bytes", f"{fault}; register the adapter again from a good copy") for fault in damaged]


def _base_fault(session: Session, version: AdapterVersion, base: BaseModel | None, compared: Comparison) -> Unmet | None:
    if compared.verdict in (BaseVerdict.EXACT, BaseVerdict.QUANTISED_OF):
        return None
    served = f"the base served here, {base.name}, is" if base else "its base is"
    if compared.verdict == BaseVerdict.DECLARED and base is not None:
        evaluated = select(EvalRun.id).where(EvalRun.version_id == version.id, EvalRun.base_model_id == base.id).limit(1)
        if session.scalar(evaluated):
            return None
        return Unmet("base", f"{served} only declared to be the one it was trained on; evaluate it on that base first")
    return Unmet("base", f"{served} '{compared.verdict}' to the one it was trained on: {compared.reason}")


def _of_the_gate(
    session: Session, version: AdapterVersion, base: BaseModel | None, rules: SurfaceRules
) -> tuple[list[Unmet], list[str]]:
    """Faults of the newest decision on exactly this: these bytes, this base, the policy that the surface asks for."""
    newest_first = (GateDecision.created_at.desc(), GateDecision.id.desc())
    decisions = list(session.scalars(select(GateDecision).where(GateDecision.version_id == version.id).order_by(*newest_first)))
    if not decisions:
        return [Unmet("gate", "the gate has not judged it; judge it and keep the report: luthier registry gate")], []
    base_id = base and base.id
    narrower: tuple[tuple[str, Callable[[GateDecision], bool]], ...] = (
        ("with other bytes", lambda one: one.manifest_digest == version.manifest_digest),
        ("on another base", lambda one: one.base_model_id == base_id),
        (f"under another policy than {(rules.policy or '')[:16]}", lambda one: rules.policy in (None, one.policy_digest)),
    )
    for other, fits in narrower:
        decisions = [one for one in decisions if fits(one)]
        if not decisions:
            return [Unmet("gate", f"the gate has judged it {other} only; judge it as it will be served")], []
    newest = decisions[0]
    unmet, warnings = [], []
    advice = "its report says how many items would decide" if newest.verdict == Verdict.INCONCLUSIVE else "its report says why"
    if newest.verdict == Verdict.INCONCLUSIVE and rules.inconclusive:
        warnings.append(f"the gate's verdict is inconclusive; {advice}")
    elif newest.verdict != Verdict.PASS:
        unmet.append(
            Unmet(
                "gate",
                f"the newest verdict of the gate ({newest.policy}, {newest.created_at:%Y-%m-%d}) is {newest.verdict}; {advice}",
            )
        )
    age = now() - newest.created_at
    if rules.gate_age_days is not None and age > timedelta(days=rules.gate_age_days):
        days = age / timedelta(days=1)
        unmet.append(Unmet("gate", f"the gate's decision is {days:.0f} days old, at most {rules.gate_age_days:g} count here"))
    return unmet, warnings


def _of_people(session: Session, version: AdapterVersion, surface: Surface, rules: SurfaceRules) -> list[Unmet]:
    granted, refused = standing_words(session, version, surface)
    unmet = []
    if len(granted) < rules.approvals:
        given = f" ({', '.join(granted)})" if granted else ""
        unmet.append(
            Unmet(
                "approvals",
                f"{len(granted)} of {rules.approvals} approvals{given}; {version.created_by}, who registered it, "
                f"does not count: luthier registry approve {name_of(version)} --surface {surface.name}",
            )
        )
    if refused:
        unmet.append(Unmet("approvals", f"{', '.join(refused)} objected; they, or a force with its reason, can lift that"))
    return unmet


def recorded_fingerprint(base: BaseModel) -> Fingerprint | None:
    """Return the fingerprint of a base model, None if it was registered without a whole one."""
    try:
        return Fingerprint(**base.fingerprint)
    except ValidationError:
        return None
