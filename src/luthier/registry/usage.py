"""What tenants used: an event for each answer, sums for each day, and answers to "how much" that cost little.

A gateway tells of its answers in batches, and tells a batch again when it did not hear that it was kept. An event is known by the
id of its request, so it counts once however often it is told, and the sums of the day grow in the same transaction by those that
were new. Nothing of prompts and answers is kept but their lengths.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from luthier.registry.database import Database, add_new, insert_into
from luthier.registry.schema import Adapter, AdapterVersion
from luthier.registry.schema_serving import Tenant, UsageEvent, UsageTotal

COUNTED = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True)
class Usage:
    """One answer that was given. `prompt_tokens` is the whole prompt, `cached_tokens` the part that was not computed again."""

    request_id: str
    tenant_id: int
    key_id: int
    model: str
    prompt_tokens: int
    completion_tokens: int
    status: str
    gateway: str
    finished_at: datetime
    cached_tokens: int = 0
    version_id: int | None = None
    surface_id: int | None = None
    experiment_id: int | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        assert min(self.prompt_tokens, self.completion_tokens, self.cached_tokens) >= 0, self


@dataclass(frozen=True)
class Used:
    """How much was used, by a tenant on a day, or of a version (NAME:VERSION, None: the bare base)."""

    tenant: str
    what: date | str | None
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def record_usage(database: Database, events: Iterable[Usage]) -> int:
    """Keep events, all of them or none, and return how many were new. What was kept before counts no second time.

    A day is that of `finished_at` in UTC.
    """
    # One order for every writer: two that tell the same events at once would otherwise wait for each other.
    told = sorted({event.request_id: event for event in events}.values(), key=lambda event: event.request_id)
    if not told:
        return 0
    with database.writing() as session:
        new = {request_id for (request_id,) in add_new(session, UsageEvent, [asdict(event) for event in told])}
        sums: dict[tuple[int, date], Counter[str]] = {}
        for event in told:
            if event.request_id in new:
                of_day = sums.setdefault((event.tenant_id, event.finished_at.astimezone(UTC).date()), Counter())
                of_day.update(
                    requests=1,
                    prompt_tokens=event.prompt_tokens,
                    cached_tokens=event.cached_tokens,
                    completion_tokens=event.completion_tokens,
                )
        if sums:
            statement = insert_into(session, UsageTotal)
            added = {name: getattr(UsageTotal, name) + statement.excluded[name] for name in COUNTED}
            grown = [
                {"tenant_id": tenant_id, "day": day} | {name: sum_of[name] for name in COUNTED}
                for (tenant_id, day), sum_of in sorted(sums.items())
            ]
            session.execute(statement.on_conflict_do_update(index_elements=["tenant_id", "day"], set_=added), grown)
        return len(new)


def tokens_of(session: Session, tenant_id: int, since: datetime) -> int:
    """Return the tokens of prompts and answers that a tenant used since a moment.

    Whole days come from their sums, what is left of the first from its events: from midnight (UTC) on it is one row.
    """
    since = since.astimezone(UTC)
    first_whole = since.date() if since.time() == time() else since.date() + timedelta(days=1)
    tokens = func.coalesce(func.sum(UsageTotal.prompt_tokens + UsageTotal.completion_tokens), 0)
    whole = select(tokens).where(UsageTotal.tenant_id == tenant_id, UsageTotal.day >= first_whole)
    total = int(session.scalar(whole) or 0)
    if (midnight := datetime.combine(first_whole, time(), UTC)) > since:
        tokens = func.coalesce(func.sum(UsageEvent.prompt_tokens + UsageEvent.completion_tokens), 0)
        within = (UsageEvent.finished_at >= since, UsageEvent.finished_at < midnight)
        total += int(session.scalar(select(tokens).where(UsageEvent.tenant_id == tenant_id, *within)) or 0)
    return total


def tokens_on(session: Session, day: date) -> dict[int, int]:
    """Return the tokens of prompts and answers of every tenant that used any on a day (UTC), by tenant id."""
    tokens = UsageTotal.prompt_tokens + UsageTotal.completion_tokens
    sums = session.execute(select(UsageTotal.tenant_id, tokens).where(UsageTotal.day == day))
    return {tenant_id: int(used) for tenant_id, used in sums}


def usage_by_day(session: Session, *, tenant_id: int | None = None, since: date | None = None) -> list[Used]:
    """Return what was used, by tenant and day, from the sums."""
    query = select(Tenant.name, UsageTotal.day, *(getattr(UsageTotal, name) for name in COUNTED)).join(Tenant)
    if tenant_id is not None:
        query = query.where(UsageTotal.tenant_id == tenant_id)
    if since is not None:
        query = query.where(UsageTotal.day >= since)
    return [Used(*row) for row in session.execute(query.order_by(Tenant.name, UsageTotal.day))]


def usage_by_version(session: Session, *, tenant_id: int | None = None, since: datetime | None = None) -> list[Used]:
    """Return what was used, by tenant and version, from the events; what the bare base answered comes last."""
    sums: list[Any] = [func.count(), *(func.sum(getattr(UsageEvent, name)) for name in COUNTED[1:])]
    query = (
        select(Tenant.name, Adapter.name, AdapterVersion.version, *sums)
        .select_from(UsageEvent)
        .join(Tenant, Tenant.id == UsageEvent.tenant_id)
        .outerjoin(AdapterVersion, AdapterVersion.id == UsageEvent.version_id)
        .outerjoin(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .group_by(Tenant.name, Adapter.name, AdapterVersion.version)
    )
    if tenant_id is not None:
        query = query.where(UsageEvent.tenant_id == tenant_id)
    if since is not None:
        query = query.where(UsageEvent.finished_at >= since)
    rows = sorted(session.execute(query), key=lambda row: (row[0], row[1] is None, row[1] or "", row[2] or 0))
    return [
        Used(tenant, None if name is None else f"{name}:{version}", *map(int, counts)) for tenant, name, version, *counts in rows
    ]
