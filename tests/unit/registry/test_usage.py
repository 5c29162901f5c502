"""Usage counts once, however often it is told and by however many; the sums are those of the events."""

import json
import subprocess
import sys
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from tests.registry_rows import add_base, add_version, key_for, tenant_for

from luthier.registry.doctor import examine_registry
from luthier.registry.place import Registry
from luthier.registry.schema_serving import ApiKey, UsageEvent, UsageTotal
from luthier.registry.usage import Usage, Used, record_usage, tokens_of, usage_by_day, usage_by_version

NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)
MIDNIGHT = datetime(2026, 11, 30, tzinfo=UTC)

WRITER = """
import sys
from datetime import UTC, datetime, timedelta
from luthier.registry.database import open_database
from luthier.registry.usage import Usage, record_usage

url, tenant_id, key_id, seed = sys.argv[1], *map(int, sys.argv[2:])
database, noon = open_database(url), datetime(2026, 11, 30, 12, tzinfo=UTC)
sys.stdin.readline()
counted = 0
for batch in range(10):
    numbers = range(batch * 20, batch * 20 + 30)  # ten of each batch are in the next one too
    numbers = numbers if seed % 2 else reversed(numbers)
    told = [Usage(f"r{n}", tenant_id, key_id, "m", n, 1, "stop", f"gateway-{seed}", noon + timedelta(hours=n)) for n in numbers]
    counted += record_usage(database, told)
print(counted)
"""


def two_tenants(registry: Registry) -> tuple[int, int]:
    found = tenant_for(registry, "acme"), tenant_for(registry, "globex")
    key_for(registry, "acme")
    key_for(registry, "globex")
    return found


def used(registry: Registry, request_id: str, tenant_id: int, at: datetime = NOON, **more: Any) -> Usage:
    with registry.database.reading() as session:
        key_id = session.scalars(select(ApiKey.id).where(ApiKey.tenant_id == tenant_id)).first() or 0
    values = {"prompt_tokens": 10, "completion_tokens": 3, "cached_tokens": 4} | more
    return Usage(request_id, tenant_id, key_id, "m", status="stop", gateway="g", finished_at=at, **values)


def totals(registry: Registry) -> dict[tuple[int, date], tuple[int, int, int, int]]:
    with registry.database.reading() as session:
        return {
            (row.tenant_id, row.day): (row.requests, row.prompt_tokens, row.cached_tokens, row.completion_tokens)
            for row in session.scalars(select(UsageTotal))
        }


def sums_of_events(registry: Registry) -> dict[tuple[int, date], tuple[int, int, int, int]]:
    sums: dict[tuple[int, date], Counter[int]] = {}
    with registry.database.reading() as session:
        for row in session.scalars(select(UsageEvent)):
            counted = sums.setdefault((row.tenant_id, row.finished_at.astimezone(UTC).date()), Counter())
            counted.update({0: 1, 1: row.prompt_tokens, 2: row.cached_tokens, 3: row.completion_tokens})
    return {of: (one[0], one[1], one[2], one[3]) for of, one in sums.items()}


def test_a_batch_that_is_told_again_counts_once(any_registry: Registry) -> None:
    acme, globex = two_tenants(any_registry)
    first = [used(any_registry, "a", acme), used(any_registry, "b", acme), used(any_registry, "c", globex)]
    assert record_usage(any_registry.database, first) == 3
    assert record_usage(any_registry.database, first) == 0
    again = [used(any_registry, "b", acme, prompt_tokens=99), used(any_registry, "d", acme), used(any_registry, "d", acme)]
    assert record_usage(any_registry.database, again) == 1
    assert record_usage(any_registry.database, []) == 0
    day = NOON.date()
    assert totals(any_registry) == {(acme, day): (3, 30, 12, 9), (globex, day): (1, 10, 4, 3)}
    assert sums_of_events(any_registry) == totals(any_registry)


def test_a_day_is_that_of_the_end_in_utc(any_registry: Registry) -> None:
    acme, _ = two_tenants(any_registry)
    east = datetime.fromisoformat("2026-12-01T00:30+02:00")
    moments = [MIDNIGHT - timedelta(microseconds=1), MIDNIGHT, east, east + timedelta(days=1)]
    told = [used(any_registry, str(number), acme, at) for number, at in enumerate(moments)]
    assert record_usage(any_registry.database, told) == 4
    assert {day.isoformat(): of[0] for (_, day), of in totals(any_registry).items()} == {
        "2026-11-29": 1, "2026-11-30": 2, "2026-12-01": 1,
    }  # fmt: skip


def test_a_batch_that_cannot_be_kept_leaves_nothing(any_registry: Registry) -> None:
    acme, _ = two_tenants(any_registry)
    with pytest.raises(IntegrityError):
        record_usage(any_registry.database, [used(any_registry, "a", acme), used(any_registry, "b", 99)])
    assert totals(any_registry) == sums_of_events(any_registry) == {}


def test_the_doctor_sees_sums_that_are_not_those_of_the_events(any_registry: Registry) -> None:
    acme, globex = two_tenants(any_registry)
    record_usage(any_registry.database, [used(any_registry, "a", acme), used(any_registry, "b", globex)])
    assert examine_registry(any_registry) == []
    with any_registry.database.writing() as session:
        session.execute(update(UsageTotal).where(UsageTotal.tenant_id == acme).values(requests=2))
    (finding,) = examine_registry(any_registry)
    assert (finding.kind, finding.subject) == ("usage", "acme")
    assert "(2, 10, 4, 3)" in finding.told and "make (1, 10, 4, 3)" in finding.told
    with any_registry.database.writing() as session:
        session.execute(delete(UsageTotal))
    assert [one.subject for one in examine_registry(any_registry)] == ["acme", "globex"]


def test_more_events_than_one_statement_takes(registry: Registry) -> None:
    acme, _ = two_tenants(registry)
    one = used(registry, "r0", acme)
    told = [Usage(**(one.__dict__ | {"request_id": f"r{number}"})) for number in range(1203)]
    assert record_usage(registry.database, told) == 1203
    assert totals(registry) == {(acme, NOON.date()): (1203, 12030, 4812, 3609)}


@pytest.mark.parametrize("hours", [0, 1, 11.5, 12, 13, 24, 40, 100])
def test_tokens_since_a_moment_are_those_of_the_events_since(any_registry: Registry, hours: float) -> None:
    acme, globex = two_tenants(any_registry)
    moments = [MIDNIGHT + timedelta(hours=12 * step) for step in range(-3, 4)]
    told = [
        used(any_registry, f"{tenant} {number}", tenant, at, prompt_tokens=2**number)
        for tenant in (acme, globex)
        for number, at in enumerate(moments)
    ]
    record_usage(any_registry.database, told)
    since = moments[-1] - timedelta(hours=hours)
    counted = [one for one in told if one.tenant_id == acme and one.finished_at >= since]
    expected = sum(one.prompt_tokens + one.completion_tokens for one in counted)
    with any_registry.database.reading() as session:
        assert tokens_of(session, acme, since) == expected
        assert tokens_of(session, acme, since.astimezone(datetime.fromisoformat("2026-01-01T00:00+05:30").tzinfo)) == expected
        assert tokens_of(session, 99, since) == 0


def test_usage_is_told_by_day_and_by_version(any_registry: Registry) -> None:
    acme, globex = two_tenants(any_registry)
    add_base(any_registry)
    add_version(any_registry)
    add_version(any_registry)
    told = [
        used(any_registry, "a", acme, version_id=1),
        used(any_registry, "b", acme, NOON + timedelta(days=1), version_id=1),
        used(any_registry, "c", acme, version_id=2),
        used(any_registry, "d", acme),
        used(any_registry, "e", globex, version_id=2),
    ]
    record_usage(any_registry.database, told)
    today, tomorrow = NOON.date(), NOON.date() + timedelta(days=1)
    with any_registry.database.reading() as session:
        assert usage_by_day(session) == [
            Used("acme", today, 3, 30, 12, 9),
            Used("acme", tomorrow, 1, 10, 4, 3),
            Used("globex", today, 1, 10, 4, 3),
        ]
        assert usage_by_day(session, tenant_id=acme, since=tomorrow) == [Used("acme", tomorrow, 1, 10, 4, 3)]
        assert usage_by_version(session) == [
            Used("acme", "orders:1", 2, 20, 8, 6),
            Used("acme", "orders:2", 1, 10, 4, 3),
            Used("acme", None, 1, 10, 4, 3),
            Used("globex", "orders:2", 1, 10, 4, 3),
        ]
        assert usage_by_version(session, tenant_id=acme, since=NOON + timedelta(hours=1)) == [
            Used("acme", "orders:1", 1, 10, 4, 3)
        ]


def test_processes_that_tell_the_same_at_once_count_it_once(any_registry: Registry, tmp_path: Path) -> None:
    acme, _ = two_tenants(any_registry)
    url = any_registry.database.url.render_as_string(hide_password=False)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, url, str(acme), "1", str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(4)
    ]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=120) for process in started]
    assert all(process.returncode == 0 for process in started), json.dumps([err for _, err in told])
    assert sum(int(out) for out, _ in told) == 210  # r0 to r209, whoever was first
    assert totals(any_registry) == sums_of_events(any_registry)
    assert sum(of[0] for of in totals(any_registry).values()) == 210
    assert sum(of[1] for of in totals(any_registry).values()) == sum(range(210))
