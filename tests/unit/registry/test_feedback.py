"""Units counted once by however many gateways, words on answers that find their arm, and a bad arm that is stopped by them."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select
from tests.registry_rows import add_base, key_for, ready_version, surface_for, tenant_for

from luthier.core.errors import ConfigError, RegistryError
from luthier.registry.columns import now
from luthier.registry.experiments import (
    Guardrail,
    change_weights,
    count_units,
    experiment_status,
    exposures,
    find_experiment,
    running_experiment,
    start_experiment,
    stop_experiment,
)
from luthier.registry.feedback import Rating, give_feedback, ratings, watch_all
from luthier.registry.place import Registry
from luthier.registry.promotion import promote
from luthier.registry.schema import Exposure
from luthier.registry.schema_serving import ExposureUnit
from luthier.registry.split import bucket_of, unit_digest
from luthier.registry.surfaces import find_surface
from luthier.registry.usage import Usage, record_usage

ACME, GLOBEX = 1, 2


def with_experiment(registry: Registry) -> Registry:
    """Share shop out between orders:1 (the control), :2 and :3, with a guardrail on ratings from 3 units and words on."""
    add_base(registry)
    surface_for(registry)
    for _ in range(3):
        ready_version(registry)
    promote(registry, "orders:1", "shop", actor="dan")
    rule = Guardrail(metric="rating", worse_by=0.1, exposures=3)
    start_experiment(registry, "shop", "first", {"orders:2": 2000, "orders:3": 2000}, actor="dan", guardrail=rule)
    for name in ("acme", "globex"):
        tenant_for(registry, name)
        key_for(registry, name)
    return registry


@pytest.fixture
def shop(registry: Registry) -> Registry:
    return with_experiment(registry)


@pytest.fixture
def any_shop(any_registry: Registry) -> Registry:
    return with_experiment(any_registry)


def seen(registry: Registry) -> dict[int, int]:
    with registry.database.reading() as session:
        return exposures(session, find_experiment(session, find_surface(session, "shop"), "first"))


def count(registry: Registry, arm: int, *units: str, epoch: int = 1) -> int:
    return count_units(registry.database, 1, epoch, {unit_digest("salt", unit): arm for unit in units})


def answer(registry: Registry, request_id: str, arm: int, *, tenant: int = ACME, epoch: int = 1) -> None:
    more = {"version_id": arm, "surface_id": 1, "experiment_id": 1, "epoch": epoch}
    record_usage(registry.database, [Usage(request_id, tenant, tenant, "shop", 5, 2, "stop", "g", now(), **more)])


def say(registry: Registry, request_id: str, value: float, *, tenant: int = ACME, metric: str = "rating") -> None:
    with registry.database.writing() as session:
        give_feedback(session, request_id, metric, value, tenant_id=tenant, key_id=tenant)


def heard(registry: Registry) -> dict[str, Rating]:
    with registry.database.reading() as session:
        return ratings(session, find_experiment(session, find_surface(session, "shop"), "first"), "rating")


# --- units -------------------------------------------------------------------------------------------------------


def test_a_digest_is_that_of_the_bucket() -> None:
    assert unit_digest("salt", "ann") == hashlib.sha256(b"salt:ann").digest()
    assert bucket_of("salt", "ann") == int.from_bytes(unit_digest("salt", "ann")[:8], "big") % 10_000


def test_a_unit_counts_once_in_an_epoch(any_shop: Registry) -> None:
    assert count(any_shop, 2, "ann", "bob") == 2
    assert count(any_shop, 2, "ann", "cem") == 1  # another gateway, or this one after a restart
    assert count(any_shop, 1, "ann") == 0  # its first arm counts
    assert count(any_shop, 1) == 0
    assert seen(any_shop) == {1: 0, 2: 3, 3: 0}
    change_weights(any_shop, "shop", {"orders:2": 5000}, actor="dan")
    assert count(any_shop, 2, "dee") == 0  # told too late
    assert count(any_shop, 2, "ann", "bob", epoch=2) == 2
    assert count(any_shop, 2, "ann", epoch=3) == 0
    assert seen(any_shop) == {1: 0, 2: 2}
    with any_shop.database.writing() as session:
        stop_experiment(session, find_experiment(session, find_surface(session, "shop")), actor="dan")
    assert count(any_shop, 2, "eve", epoch=2) == 0
    assert count_units(any_shop.database, 99, 1, {bytes(32): 1}) == 0


def test_units_live_as_long_as_their_epoch_and_the_sums_stay(any_shop: Registry) -> None:
    def kept() -> list[tuple[int, bytes]]:
        with any_shop.database.reading() as session:
            return [(one.epoch, one.unit_digest) for one in session.scalars(select(ExposureUnit))]

    count(any_shop, 2, "ann")
    assert kept() == [(1, unit_digest("salt", "ann"))]
    change_weights(any_shop, "shop", {"orders:2": 5000}, actor="dan")
    assert kept() == []
    count(any_shop, 2, "bob", epoch=2)
    assert kept() == [(2, unit_digest("salt", "bob"))]
    with any_shop.database.writing() as session:
        stop_experiment(session, find_experiment(session, find_surface(session, "shop")), actor="dan")
    assert kept() == []
    with any_shop.database.reading() as session:
        assert {(row.epoch, row.count) for row in session.scalars(select(Exposure).where(Exposure.version_id == 2))} == {
            (1, 1),
            (2, 1),
        }


def test_what_is_no_arm_counts_nothing(any_shop: Registry) -> None:
    change_weights(any_shop, "shop", {"orders:2": 5000}, actor="dan")
    with pytest.raises(RegistryError, match="version id 3 is no arm"):
        count(any_shop, 3, "ann", epoch=2)
    assert count(any_shop, 2, "ann", epoch=2) == 1  # and the unit was not used up


def test_gateways_at_once_count_a_unit_once(any_shop: Registry) -> None:
    units = [f"user-{number}" for number in range(120)]

    def gateway(number: int) -> int:
        mine = units if number % 2 else units[::-1]
        return sum(count(any_shop, 2, *mine[start : start + 30]) for start in range(0, len(mine), 20))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(gateway, range(4))) == len(units)
    assert seen(any_shop) == {1: 0, 2: len(units), 3: 0}


# --- words -------------------------------------------------------------------------------------------------------


def test_a_word_finds_the_arm_of_its_answer(any_shop: Registry) -> None:
    for request_id, arm in (("a", 1), ("b", 1), ("c", 2)):
        answer(any_shop, request_id, arm)
    say(any_shop, "early", 0.5)  # before its answer was recorded
    for request_id, value in (("a", 1.0), ("b", 0.5), ("c", 0.25), ("c", 0.75)):  # the last word on c counts
        say(any_shop, request_id, value)
    say(any_shop, "c", 9.0, metric="speed")
    assert heard(any_shop) == {"orders:1": Rating(0.75, 2), "orders:2": Rating(0.75, 1)}
    answer(any_shop, "early", 3)
    assert heard(any_shop)["orders:3"] == Rating(0.5, 1)


def test_a_word_on_somebody_elses_answer_counts_for_nothing_and_hinders_nobody(any_shop: Registry) -> None:
    say(any_shop, "a", 0.0, tenant=GLOBEX)
    answer(any_shop, "a", 2, tenant=ACME)
    assert heard(any_shop) == {}
    say(any_shop, "a", 1.0, tenant=ACME)
    assert heard(any_shop) == {"orders:2": Rating(1.0, 1)}


def test_words_on_another_epoch_do_not_count(shop: Registry) -> None:
    answer(shop, "a", 2)
    say(shop, "a", 1.0)
    change_weights(shop, "shop", {"orders:2": 5000}, actor="dan")
    assert heard(shop) == {}
    answer(shop, "b", 2, epoch=2)
    say(shop, "b", 0.0)
    assert heard(shop) == {"orders:2": Rating(0.0, 1)}


@pytest.mark.parametrize(
    ("request_id", "metric", "value"),
    [
        ("a", "rating", float("nan")),
        ("a", "rating", float("inf")),
        ("a", "", 1.0),
        ("a", "m" * 101, 1.0),
        ("", "rating", 1.0),
        ("a" * 256, "rating", 1.0),
    ],
)
def test_what_is_no_word_is_refused(shop: Registry, request_id: str, metric: str, value: float) -> None:
    with pytest.raises(ConfigError):
        say(shop, request_id, value, metric=metric)


# --- the guardrail -----------------------------------------------------------------------------------------------


def rate(registry: Registry, arm: int, *values: float, epoch: int = 1) -> None:
    """Have so many units see an arm, and each rate it."""
    for number, value in enumerate(values):
        request_id = f"{arm} {epoch} {number}"
        count(registry, arm, request_id, epoch=epoch)
        answer(registry, request_id, arm, epoch=epoch)
        say(registry, request_id, value)


def status(registry: Registry) -> dict[str, Any]:
    with registry.database.reading() as session:
        return experiment_status(session, find_experiment(session, find_surface(session, "shop"), "first"))


def test_a_bad_arm_is_stopped_by_what_clients_say(any_shop: Registry) -> None:
    rate(any_shop, 1, 0.9, 0.8, 1.0)
    rate(any_shop, 2, 0.9, 0.9, 0.8)
    rate(any_shop, 3, 0.7, 0.7)
    assert watch_all(any_shop.database, actor="guardrail") == {}  # two words on orders:3 are not three
    rate(any_shop, 3, 0.7, 0.7, 0.4)
    told = watch_all(any_shop.database, actor="guardrail")
    assert told == {"shop": "rating of orders:3 is 0.6, of the control orders:1 0.9"}
    assert status(any_shop)["ended_at"] is not None
    with any_shop.database.reading() as session:
        assert running_experiment(session, find_surface(session, "shop")) is None
    assert watch_all(any_shop.database, actor="guardrail") == {}


def test_an_arm_that_is_good_enough_goes_on(shop: Registry) -> None:
    rate(shop, 1, 0.9, 0.9, 0.9)
    rate(shop, 2, 0.85, 0.85, 0.85)
    assert watch_all(shop.database, actor="guardrail") == {}
    assert status(shop)["ended_at"] is None


def test_without_words_on_the_control_nothing_is_judged(shop: Registry) -> None:
    rate(shop, 2, 0.0, 0.0, 0.0)
    rate(shop, 1, 1.0, 1.0)
    assert watch_all(shop.database, actor="guardrail") == {}
    rate(shop, 1, 1.0, 1.0, 1.0)
    assert "shop" in watch_all(shop.database, actor="guardrail")


def test_words_of_few_units_do_not_count_however_many_they_are(shop: Registry) -> None:
    rate(shop, 1, 1.0, 1.0, 1.0)
    count(shop, 2, "ann")
    for number in range(9):
        answer(shop, f"ann {number}", 2)
        say(shop, f"ann {number}", 0.0)
    assert watch_all(shop.database, actor="guardrail") == {}
    count(shop, 2, "bob", "cem")
    assert "shop" in watch_all(shop.database, actor="guardrail")
