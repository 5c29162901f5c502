"""What a gateway has to know, read at once: the keys, and for each tenant the names that it may call.

A tenant's names are a dictionary of its own. What exists for others only is not in it, so a gateway can neither serve it nor
tell, by words or by the time that it takes, that it exists. A view is never changed: a newer one takes its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from luthier.registry.split import Split
from luthier.registry.tenancy import Quotas, Scope

NO_LIMITS = Quotas()


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


@dataclass(frozen=True)
class VersionTarget:
    """One immutable version. `reference` (orders:3) is what a backend loads it by; `version_id` is None outside a registry."""

    reference: str
    version_id: int | None = None
    manifest_digest: str | None = None


@dataclass(frozen=True)
class Arms:
    """A running experiment on a surface: how it shares out its units, and who steps in for an arm that may not be used."""

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


@dataclass(frozen=True)
class BaseTarget:
    """The bare base model, by the name under which it is served."""

    name: str


Target = VersionTarget | SurfaceTarget | BaseTarget


@dataclass(frozen=True)
class ServingView:
    """What may be served to whom at one moment.

    `revision` grows with every change of the registry. `callers` go by the digest of their key, `names` by tenant id and then by
    what stands in a request's `model`. `listed` are the names that a tenant is shown, in their order.
    """

    revision: int
    callers: Mapping[str, Caller] = field(default_factory=dict)
    names: Mapping[int, Mapping[str, Target]] = field(default_factory=dict)
    listed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    created: Mapping[str, datetime] = field(default_factory=dict)
