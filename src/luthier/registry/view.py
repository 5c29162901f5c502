"""What a gateway has to know, read at once: the keys, and for each tenant the names that it may call.

A tenant's names are a dictionary of its own. What exists for others only is not in it, so a gateway can neither serve it nor
tell, by words or by the time that it takes, that it exists. A view is never changed: a newer one takes its place.

    base_name              the base, where it was granted
    SURFACE                what serves it, or its experiment's arms, where it was granted
    ADAPTER:3              a version of an adapter that is the tenant's own or was granted; or one that was granted by itself
    ADAPTER:stable         what the alias names now, of an adapter that is the tenant's own or was granted
    ADAPTER                the same, where exactly one version may be used

A name that could mean several things means the first of them. What is held, retired or erased is no name at all, nor is a version
of another base than the one that is served.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, contains_eager

from luthier.formats.fingerprint import Fingerprint, Verdict, compare
from luthier.registry.columns import Lifecycle, now
from luthier.registry.conditions import recorded_fingerprint
from luthier.registry.schema import Adapter, AdapterVersion, Alias, AuditEvent, BaseModel, Deployment, Experiment, Surface
from luthier.registry.schema_serving import ApiKey, Grant, Tenant
from luthier.registry.split import Split
from luthier.registry.tenancy import GrantKind, Quotas, Scope

NO_LIMITS = Quotas()
REFUSED = frozenset({Verdict.MISMATCH, Verdict.UNKNOWN})
"""Verdicts on a base with which no engine loads an adapter."""


@dataclass(frozen=True)
class Caller:
    """Who a key stands for, and what it may do."""

    tenant_id: int
    tenant: str
    key_id: int
    key: str
    scopes: frozenset[Scope]
    quotas: Quotas = NO_LIMITS
    expires_at: datetime | None = None

    @property
    def actor(self) -> str:
        """The name in the audit chain: TENANT/KEY."""
        return f"{self.tenant}/{self.key}"


@dataclass(frozen=True, slots=True)
class VersionTarget:
    """One immutable version. `reference` (orders:3) is what a backend loads it by; `version_id` is None outside a registry."""

    reference: str
    version_id: int | None = None
    manifest_digest: str | None = None
    created_at: datetime | None = None


@dataclass(frozen=True)
class Arms:
    """A running experiment on a surface: how it shares out its units, and the versions of those arms that may be used.

    The units of an arm that is not in `versions` see the control.
    """

    experiment_id: int
    epoch: int
    unit: str
    salt: str
    split: Split
    versions: Mapping[int, VersionTarget]


@dataclass(frozen=True)
class SurfaceTarget:
    """A surface: what serves it alone, or is the control of its experiment. None: nothing serves it that may be used."""

    surface: str
    control: VersionTarget | None
    arms: Arms | None = None
    surface_id: int | None = None
    created_at: datetime | None = None

    @property
    def is_served(self) -> bool:
        """Whether anybody at all gets an answer."""
        return self.control is not None or bool(self.arms and self.arms.versions)


@dataclass(frozen=True)
class BaseTarget:
    """The bare base model, by the name under which it is served."""

    name: str
    created_at: datetime | None = None


Target = VersionTarget | SurfaceTarget | BaseTarget


@dataclass(frozen=True)
class ServingView:
    """What may be served to whom at one moment.

    `revision` is another one after every change of the registry. `callers` go by the digest of their key, `names` by tenant id
    and then by what stands in a request's `model`. `listed` are the names that a tenant is shown, in their order. `held` are the
    versions on hold: no name means one, and whatever still runs with one is to end.
    """

    revision: int
    callers: Mapping[str, Caller] = field(default_factory=dict)
    names: Mapping[int, Mapping[str, Target]] = field(default_factory=dict)
    listed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    held: frozenset[str] = frozenset()


def revision_of(session: Session) -> int:
    """Return a number that is another one after every change that a view can show. It takes one look at an index.

    It is the id of the last audit event: whatever changes keys, grants or what is served writes one in the same transaction. Ask
    whether it differs, not whether it grew: a registry that was restored from a backup has a smaller one.
    """
    return session.scalar(select(func.max(AuditEvent.id))) or 0


def read_view(session: Session, *, base_name: str, fingerprint: Fingerprint | None = None) -> ServingView:
    """Read what may be served to whom now, from a session that sees one state (`Database.reading`).

    `base_name` is the name of the base in requests. With the `fingerprint` of the served base, versions that were trained on
    another one, or on nobody knows which, are left out, as the engine would refuse them.
    """
    revision = revision_of(session)
    versions, adapters = _usable(session, fingerprint)
    references = {target.reference: target for target in versions.values()}
    surfaces = _surfaces(session, versions)
    own: dict[str, list[str]] = {}
    for name, tenant in session.execute(select(Adapter.name, Adapter.tenant)):
        if tenant is not None:
            own.setdefault(tenant, []).append(name)
    grants: dict[int, list[tuple[str, str]]] = {}
    for tenant_id, kind, target in session.execute(select(Grant.tenant_id, Grant.kind, Grant.target)):
        grants.setdefault(tenant_id, []).append((kind, target))

    names: dict[int, dict[str, Target]] = {}
    for tenant_id, tenant in session.execute(select(Tenant.id, Tenant.name).where(Tenant.is_active)):
        granted: dict[str, list[str]] = {kind: [] for kind in GrantKind}
        for kind, target in grants.get(tenant_id, ()):
            granted[kind].append(target)
        first: dict[str, Target] = {base_name: BaseTarget(base_name)} if granted[GrantKind.BASE] else {}
        for name in sorted(granted[GrantKind.SURFACE]):
            first.setdefault(name, surfaces[name])  # surfaces are never deleted
        rest: dict[str, Target] = {}
        for name in sorted({*own.get(tenant, ()), *granted[GrantKind.ADAPTER]}):
            rest.update(adapters.get(name, {}))
        rest.update({name: references[name] for name in sorted(granted[GrantKind.VERSION]) if name in references})
        names[tenant_id] = first | rest | first
    listed = {tenant_id: _listed(known) for tenant_id, known in names.items()}
    return ServingView(revision, _callers(session), names, listed, _held(session))


def caller_of(key: ApiKey) -> Caller:
    """Return who a key stands for."""
    tenant = key.tenant
    scopes = frozenset(Scope(word) for word in key.scopes)
    return Caller(tenant.id, tenant.name, key.id, key.name, scopes, Quotas(**tenant.quotas), key.expires_at)


def working_keys() -> Any:
    """Return the query for the keys that are neither revoked nor expired, of tenants that are active."""
    lasting = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())
    return select(ApiKey).join(ApiKey.tenant).where(Tenant.is_active, ApiKey.revoked_at.is_(None), lasting)


def _callers(session: Session) -> dict[str, Caller]:
    query = working_keys().options(contains_eager(ApiKey.tenant))
    return {key.digest: caller_of(key) for key in session.scalars(query)}


def _usable(
    session: Session, fingerprint: Fingerprint | None
) -> tuple[dict[int, VersionTarget], dict[str, dict[str, VersionTarget]]]:
    """The versions that may be used, by id; and by adapter, under every name that they have there."""
    query = (
        select(Adapter.name, AdapterVersion.version, AdapterVersion.id, AdapterVersion.manifest_digest, AdapterVersion.created_at)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .where(AdapterVersion.lifecycle == Lifecycle.CANDIDATE, AdapterVersion.hold_reason.is_(None))
        .order_by(Adapter.name, AdapterVersion.version)
    )
    if fingerprint is not None:
        query = query.where(AdapterVersion.base_model_id.in_(_fitting_bases(session, fingerprint)))
    versions: dict[int, VersionTarget] = {}
    numbered: dict[str, dict[str, VersionTarget]] = {}
    for name, number, version_id, digest, created_at in session.execute(query):
        versions[version_id] = target = VersionTarget(f"{name}:{number}", version_id, digest, created_at)
        numbered.setdefault(name, {})[target.reference] = target
    adapters = {name: ({name: next(iter(known.values()))} if len(known) == 1 else {}) | known for name, known in numbered.items()}
    aliases = select(Adapter.name, Alias.name, Alias.version_id).join(Adapter, Adapter.id == Alias.adapter_id)
    for name, alias, version_id in session.execute(aliases.order_by(Adapter.name, Alias.name)):
        if version_id in versions:
            adapters[name][f"{name}:{alias}"] = versions[version_id]
    return versions, adapters


def _fitting_bases(session: Session, served: Fingerprint) -> list[int]:
    """The base models whose adapters an engine with the served base loads."""
    known = [(base.id, recorded_fingerprint(base)) for base in session.scalars(select(BaseModel))]
    return [base_id for base_id, recorded in known if compare(recorded, served).verdict not in REFUSED]


def _surfaces(session: Session, versions: Mapping[int, VersionTarget]) -> dict[str, SurfaceTarget]:
    """Every surface by name, with what serves it; what may not be used is left out."""
    alone = select(Deployment.surface_id, Deployment.version_id)
    alone = alone.where(Deployment.ended_at.is_(None), Deployment.experiment_id.is_(None))
    serving = dict(session.execute(alone).all())
    running = {one.surface_id: one for one in session.scalars(select(Experiment).where(Experiment.ended_at.is_(None)))}
    weights: dict[int, dict[int, int]] = {}
    shared = (
        select(Experiment.id, Deployment.version_id, Deployment.weight_bp)
        .join(Deployment, Experiment.id == Deployment.experiment_id)
        .where(Experiment.ended_at.is_(None), Deployment.epoch == Experiment.epoch)
    )
    for experiment_id, version_id, weight in session.execute(shared):
        weights.setdefault(experiment_id, {})[version_id] = weight
    found: dict[str, SurfaceTarget] = {}
    for surface_id, name, created_at in session.execute(select(Surface.id, Surface.name, Surface.created_at)):
        control, arms = serving.get(surface_id), None
        if (experiment := running.get(surface_id)) is not None:
            control = experiment.guardrail["control"]
            split = Split(experiment.salt, weights[experiment.id])
            usable = {version_id: versions[version_id] for version_id in split.weights if version_id in versions}
            arms = Arms(experiment.id, experiment.epoch, experiment.unit, experiment.salt, split, usable)
        target = None if control is None else versions.get(control)
        found[name] = SurfaceTarget(name, target, arms, surface_id, created_at)
    return found


def _held(session: Session) -> frozenset[str]:
    """The versions on hold, as NAME:NUMBER."""
    query = select(Adapter.name, AdapterVersion.version).join(Adapter, Adapter.id == AdapterVersion.adapter_id)
    held = session.execute(query.where(AdapterVersion.hold_reason.is_not(None)))
    return frozenset(f"{name}:{number}" for name, number in held)


def _listed(names: Mapping[str, Target]) -> tuple[str, ...]:
    """The names that are answered at this moment: a surface that nothing serves is known, but not offered."""
    return tuple(name for name, target in names.items() if not isinstance(target, SurfaceTarget) or target.is_served)
