"""The tables of what is served to whom: tenants, their keys and grants, what they used, and what they said of the answers.

Keys are kept as their SHA-256. Prompts and answers are kept nowhere. `schema.py` has the rest of the tables, and loads these.
"""

from datetime import date, datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Index, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from luthier.registry.columns import Row, now


class Tenant(Row):
    """Whoever is served as one: names of its own, quotas of its own. An adapter whose `tenant` is this name is its own."""

    __tablename__ = "tenant"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    quotas: Mapped[dict[str, Any]]
    is_active: Mapped[bool] = mapped_column(default=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]


class ApiKey(Row):
    """A key of a tenant. `shown` is how it begins, `digest` its SHA-256; the key itself was shown once and is not here."""

    __tablename__ = "api_key"
    __table_args__ = (UniqueConstraint("tenant_id", "name"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"))
    name: Mapped[str]
    shown: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]

    tenant: Mapped[Tenant] = relationship()


class Grant(Row):
    """A tenant may call what is not its own: an adapter, one version, a surface, or the base (whose `target` is empty)."""

    __tablename__ = "tenant_grant"  # `grant` is a word of SQL

    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)  # a GrantKind
    target: Mapped[str] = mapped_column(Text, primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    created_by: Mapped[str]


# --- what was used -----------------------------------------------------------------------------------------------


class UsageEvent(Row):
    """One answer that was given: who asked, what answered, and how many tokens it took. Its id makes it count once."""

    __tablename__ = "usage_event"
    __table_args__ = (Index(None, "tenant_id", "finished_at"), Index(None, "experiment_id", "epoch"))

    request_id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"))
    key_id: Mapped[int] = mapped_column(ForeignKey("api_key.id"))
    version_id: Mapped[int | None] = mapped_column(ForeignKey("adapter_version.id"))  # none: the bare base
    model: Mapped[str] = mapped_column(Text)  # the name that was asked for
    surface_id: Mapped[int | None] = mapped_column(ForeignKey("surface.id"))
    experiment_id: Mapped[int | None] = mapped_column(ForeignKey("experiment.id"))
    epoch: Mapped[int | None]
    prompt_tokens: Mapped[int]  # all of the prompt, `cached_tokens` among them
    cached_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    status: Mapped[str] = mapped_column(String(32))  # stop, length, cancelled, error, ...
    gateway: Mapped[str]
    finished_at: Mapped[datetime]


class UsageTotal(Row):
    """A tenant's sums of a day (UTC). They grow by events that were really added, in the same transaction."""

    __tablename__ = "usage_total"

    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger)
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    cached_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)


# --- what was seen, and what was said of it ----------------------------------------------------------------------


class ExposureUnit(Row):
    """A unit saw an arm in an epoch: so that it is counted once, by however many gateways and through restarts.

    `unit_digest` is SHA-256 over the experiment's salt and the unit. The salt is in this database too, so whoever has it can try
    identifiers: the rows live only as long as their epoch, and are deleted with its end.
    """

    __tablename__ = "exposure_unit"

    experiment_id: Mapped[int] = mapped_column(ForeignKey("experiment.id"), primary_key=True)
    epoch: Mapped[int] = mapped_column(primary_key=True)
    unit_digest: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"))


class Feedback(Row):
    """What a tenant says of an answer, by metric; a later word replaces it.

    It may come before the answer's usage event, which tells the arm and the epoch, so it names the request and points to no row.
    With the tenant in the key, nobody can take the place of another's word.
    """

    __tablename__ = "feedback"

    request_id: Mapped[str] = mapped_column(primary_key=True)
    metric: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[int] = mapped_column(ForeignKey("tenant.id"), primary_key=True)
    key_id: Mapped[int] = mapped_column(ForeignKey("api_key.id"))
    value: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(default=now)


# --- what servers hold -------------------------------------------------------------------------------------------


class Holding(Row):
    """A server holds a version in memory, or is about to. `seen_at` is when it last said so (holding.py)."""

    __tablename__ = "holding"

    server: Mapped[str] = mapped_column(primary_key=True)
    version_id: Mapped[int] = mapped_column(ForeignKey("adapter_version.id"), primary_key=True, index=True)
    seen_at: Mapped[datetime]
