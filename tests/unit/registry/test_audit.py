"""The audit chain: linear under many writers, and every change of what was written is seen and placed."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import delete, select, text, update

from luthier.core.errors import RegistryError
from luthier.registry.audit import BEGINNING, check_chain, events, record
from luthier.registry.columns import now
from luthier.registry.place import Registry
from luthier.registry.schema import AuditEvent

WRITERS, EACH = 8, 12


def write(registry: Registry, count: int = 5) -> None:
    with registry.database.writing() as session:
        for number in range(count):
            record(session, "ada", "version.registered", f"adapter/orders/{number}", {"number": number, "share": 0.1})


def faults(registry: Registry, **options: Any) -> list[tuple[int, str]]:
    with registry.database.reading() as session:
        return [(fault.event_id, fault.what) for fault in check_chain(session, **options).faults]


def test_the_hash_is_that_of_the_documented_bytes(registry: Registry) -> None:
    with registry.database.writing() as session:
        event = record(session, "ada", "version.held", "adapter/orders/3", {"b": [1, None], "a": "ü"})
        moment = event.created_at.isoformat()
    told = f'["{BEGINNING}","{moment}","ada","version.held","adapter/orders/3",{{"a":"ü","b":[1,null]}}]'
    assert event.hash == hashlib.sha256(told.encode()).hexdigest()
    assert json.loads(told)[0] == event.previous_hash


def test_an_untouched_chain_holds(any_registry: Registry) -> None:
    write(any_registry)
    write(any_registry)
    with any_registry.database.reading() as session:
        report = check_chain(session)
        assert (report.num_events, report.faults) == (10, ())
        assert report.head == session.scalar(select(AuditEvent.hash).order_by(AuditEvent.id.desc()).limit(1))
    assert not faults(any_registry, head=report.head)


def test_writers_at_once_leave_one_line(any_registry: Registry) -> None:
    def writer(name: int) -> None:
        for number in range(EACH):
            with any_registry.database.writing() as session:
                record(session, f"writer {name}", "version.registered", f"adapter/orders/{number}")

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(writer, range(WRITERS)))
    with any_registry.database.reading() as session:
        report = check_chain(session)
        followed = session.scalars(select(AuditEvent.previous_hash)).all()
    assert (report.num_events, report.faults) == (WRITERS * EACH, ())
    assert len(set(followed)) == WRITERS * EACH


def test_a_failed_transaction_leaves_no_event(any_registry: Registry) -> None:
    write(any_registry, 2)

    def fail() -> None:
        with any_registry.database.writing() as session:
            record(session, "ada", "version.registered", "adapter/orders/9")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    write(any_registry, 1)
    with any_registry.database.reading() as session:
        report = check_chain(session)
    assert (report.num_events, report.faults) == (3, ())


@pytest.mark.parametrize(
    "change",
    [
        {"actor": "eve"},
        {"action": "version.retired"},
        {"subject": "adapter/orders/7"},
        {"payload": {"number": 2, "share": 0.2}},
        {"created_at": now() - timedelta(days=1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_changed_event_is_found(registry: Registry, change: dict[str, Any]) -> None:
    write(registry)
    with registry.database.writing() as session:
        session.execute(update(AuditEvent).where(AuditEvent.id == 3).values(**change))
    assert [(where, "was changed" in what) for where, what in faults(registry)] == [(3, True)]


def test_a_changed_event_with_a_new_hash_breaks_the_chain_after_it(registry: Registry) -> None:
    from luthier.registry.audit import event_hash

    write(registry)
    with registry.database.writing() as session:
        event = session.get_one(AuditEvent, 3)
        event.actor = "eve"
        event.hash = event_hash(event)
    assert [(where, "does not follow" in what) for where, what in faults(registry)] == [(4, True)]


def test_an_event_taken_out_is_found(registry: Registry) -> None:
    write(registry)
    with registry.database.writing() as session:
        session.execute(delete(AuditEvent).where(AuditEvent.id == 2))
    assert [(where, "after event 1" in what) for where, what in faults(registry)] == [(3, True)]


def test_events_cut_off_at_the_end_are_found_by_a_noted_head(registry: Registry) -> None:
    write(registry)
    with registry.database.reading() as session:
        head = check_chain(session).head
    write(registry, 1)
    assert not faults(registry, head=head)
    with registry.database.writing() as session:
        session.execute(delete(AuditEvent).where(AuditEvent.id >= 5))
    assert not faults(registry)
    assert [(where, "cut off" in what) for where, what in faults(registry, head=head)] == [(4, True)]


def test_a_server_in_another_time_zone_changes_no_hash(postgres_url: str, tmp_path: Any) -> None:
    from luthier.registry.place import open_registry

    opened = open_registry(f"{postgres_url}&blobs={tmp_path}", create=True)
    write(opened)
    with opened.database.writing() as session:
        session.execute(text("SET TIME ZONE 'Asia/Kolkata'"))
        assert not check_chain(session).faults
        record(session, "ada", "version.registered", "adapter/orders/9")
    assert not faults(opened)
    opened.database.engine.dispose()


@pytest.mark.parametrize(
    "payload",
    [{"who": "ada@example.org"}, {"deep": [{"ada@example.org": 1}]}, {"reason": "x" * 301}, {"reason": "two\nlines"}],
)
def test_words_about_people_do_not_enter_the_chain(registry: Registry, payload: dict[str, Any]) -> None:
    with registry.database.writing() as session:
        with pytest.raises(RegistryError, match="cannot be erased"):
            record(session, "ada", "version.held", "adapter/orders/3", payload)
        record(session, "ada", "version.held", "adapter/orders/3", {"version": "orders@3", "digest": "0" * 64})


def test_events_are_found_by_what_they_tell(any_registry: Registry) -> None:
    start = now()
    with any_registry.database.writing() as session:
        record(session, "ada", "version.registered", "adapter/orders/1")
        record(session, "bob", "version.held", "adapter/orders/1")
        record(session, "ada", "versions", "adapter/orders_2")
        record(session, "ada", "surface.added", "surface/shop")

    def found(**filters: Any) -> list[int]:
        with any_registry.database.reading() as session:
            return [event.id for event in events(session, **filters)]

    first = found()[0]
    assert [id - first for id in found(action="version")] == [0, 1]
    assert [id - first for id in found(subject="adapter/orders")] == [0, 1]
    assert [id - first for id in found(actor="ada", action="version.registered")] == [0]
    assert [id - first for id in found(limit=2)] == [2, 3]
    assert len(found(since=start)) == 4 and found(until=start) == []
