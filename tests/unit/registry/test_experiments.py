"""Experiments: arms that may serve, shares that sum to everything, counts that are never mixed, and the control when in doubt."""

from typing import Any

import pytest
from sqlalchemy import select
from tests.registry_rows import add_base, add_version, judge, ready_version, surface_for

from luthier.core.errors import RefusedError, RegistryError
from luthier.registry.audit import check_chain, events
from luthier.registry.experiments import (
    Guardrail,
    change_weights,
    check_guardrail,
    count_exposures,
    experiment_status,
    find_experiment,
    route,
    running_experiment,
    split_of,
    start_experiment,
    stop_experiment,
)
from luthier.registry.place import Registry
from luthier.registry.production import history, in_production
from luthier.registry.promotion import promote, rollback
from luthier.registry.retirement import retire, undeploy
from luthier.registry.schema import Exposure
from luthier.registry.surfaces import find_surface, hold
from luthier.registry.versions import find_version, name_of

UNITS = [f"user-{number}" for number in range(60)]


def with_control(registry: Registry) -> Registry:
    """Add a surface that orders:1 serves, and orders:2 and orders:3 that may serve it."""
    add_base(registry)
    surface_for(registry)
    for _ in range(3):
        ready_version(registry)
    promote(registry, "orders:1", "shop", actor="dan")
    return registry


@pytest.fixture
def shop(registry: Registry) -> Registry:
    return with_control(registry)


@pytest.fixture
def any_shop(any_registry: Registry) -> Registry:
    return with_control(any_registry)


def shares(registry: Registry) -> dict[str, int]:
    with registry.database.reading() as session:
        return {f"{one.name}:{one.version}": one.weight_bp for one in in_production(session, surface="shop")}


def status(registry: Registry, name: str | None = None) -> dict[str, Any]:
    with registry.database.reading() as session:
        return experiment_status(session, find_experiment(session, find_surface(session, "shop"), name))


def routed(registry: Registry) -> dict[str, str]:
    with registry.database.reading() as session:
        surface = find_surface(session, "shop")
        return {unit: name_of(route(session, surface, unit)) for unit in UNITS}


def count(registry: Registry, **counts: int) -> None:
    with registry.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, "shop"))
        named = {find_version(session, name.replace("_", ":")).id: number for name, number in counts.items()}
        count_exposures(session, experiment, named)


def test_an_experiment_shares_out_a_surface_and_gives_it_back(any_shop: Registry) -> None:
    start_experiment(any_shop, "shop", "first", {"orders:2": 3000}, actor="dan")
    assert shares(any_shop) == {"orders:1": 7000, "orders:2": 3000}
    assert set(routed(any_shop).values()) == {"orders:1", "orders:2"}
    with pytest.raises(RefusedError, match="an experiment runs on shop"):
        promote(any_shop, "orders:3", "shop", actor="dan", force_reason="now")
    with pytest.raises(RefusedError, match="an experiment runs on shop"):
        rollback(any_shop, "shop", actor="dan", to="orders:3")
    with any_shop.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, "shop"))
        assert name_of(stop_experiment(session, experiment, actor="dan")) == "orders:1"
    assert shares(any_shop) == {"orders:1": 10_000}
    promote(any_shop, "orders:2", "shop", actor="dan", expected_current="orders:1")
    with any_shop.database.reading() as session:
        assert not check_chain(session).faults
        assert [one.action for one in events(session, action="experiment")] == ["experiment.start", "experiment.stop"]


def test_a_change_of_weights_keeps_units_and_begins_a_new_count(shop: Registry) -> None:
    start_experiment(shop, "shop", "first", {"orders:2": 3000}, actor="dan", salt="salt")
    before = routed(shop)
    count(shop, orders_1=70, orders_2=30)
    change_weights(shop, "shop", {"orders:2": 5000}, actor="dan")
    moved = {(before[unit], arm) for unit, arm in routed(shop).items() if arm != before[unit]}
    assert moved == {("orders:1", "orders:2")}
    count(shop, orders_2=5)
    with shop.database.writing() as session, pytest.raises(RegistryError, match="in epoch 1, 'first' is in epoch 2"):
        count_exposures(session, find_experiment(session, find_surface(session, "shop")), {2: 40}, epoch=1)
    told = status(shop)
    assert told["epoch"] == 2 and told["salt"] == "salt"
    assert {arm: one["exposures"] for arm, one in told["arms"].items()} == {"orders:1": 0, "orders:2": 5}
    with shop.database.reading() as session:
        kept = {(row.epoch, row.version_id): row.count for row in session.scalars(select(Exposure))}
        assert kept == {(1, 1): 70, (1, 2): 30, (2, 1): 0, (2, 2): 5}
        line = [(one.version, one.weight_bp, one.experiment) for one in history(session, "shop")]
    first, second = {(1, 7000, "first"), (2, 3000, "first")}, {(1, 5000, "first"), (2, 5000, "first")}
    assert line[0] == (1, 10_000, None) and set(line[1:3]) == first and set(line[3:]) == second


def test_other_arms_must_be_allowed_to_serve_and_are_all_listed(shop: Registry) -> None:
    start_experiment(shop, "shop", "first", {"orders:2": 1000}, actor="dan")
    add_base(shop, "other")
    other, unjudged = add_version(shop, base="other"), add_version(shop)
    judge(shop, other)
    with pytest.raises(RefusedError) as refusal:
        change_weights(shop, "shop", {other: 1000, unjudged: 1000}, actor="dan")
    told = str(refusal.value)
    assert "orders:4: base: the control's base is tiny (exact), its own other (exact)" in told
    assert "orders:5: gate: the gate has not judged it" in told and "orders:5: approvals" in told
    assert shares(shop) == {"orders:1": 9000, "orders:2": 1000}
    change_weights(shop, "shop", {"orders:3": 500}, actor="dan")
    assert shares(shop) == {"orders:1": 9500, "orders:3": 500}


@pytest.mark.parametrize(
    "weights", [{}, {"orders:1": 1000}, {"orders:2": 10_001}, {"orders:2": -1}, {"orders:2": 6000, "orders:3": 6000}]
)
def test_weights_that_leave_nothing_or_too_much_are_refused(shop: Registry, weights: dict[str, int]) -> None:
    with pytest.raises(RegistryError, match=r"weights"):
        start_experiment(shop, "shop", "first", weights, actor="dan")
    assert shares(shop) == {"orders:1": 10_000}


def test_an_experiment_needs_a_control_and_a_name_of_its_own(shop: Registry) -> None:
    surface_for(shop, name="desk")
    with pytest.raises(RefusedError, match="no control"):
        start_experiment(shop, "desk", "first", {"orders:2": 1000}, actor="dan")
    experiment = start_experiment(shop, "shop", "first", {"orders:2": 1000}, actor="dan")
    with pytest.raises(RefusedError, match="'first' runs there"):
        start_experiment(shop, "shop", "second", {"orders:2": 1000}, actor="dan")
    with shop.database.writing() as session:
        stop_experiment(session, session.get_one(type(experiment), experiment.id), actor="dan")
    with pytest.raises(RegistryError, match="choose another name"):
        start_experiment(shop, "shop", "first", {"orders:2": 1000}, actor="dan")


def test_units_of_a_held_arm_see_the_control_and_never_the_bare_base(shop: Registry) -> None:
    start_experiment(shop, "shop", "first", {"orders:2": 5000}, actor="dan")
    with shop.database.writing() as session:
        hold(session, find_version(session, "orders:2"), "a complaint", actor="dan")
    assert set(routed(shop).values()) == {"orders:1"}
    with shop.database.writing() as session:
        hold(session, find_version(session, "orders:1"), "another", actor="dan")
    with pytest.raises(RefusedError, match="may not be used"):
        routed(shop)


@pytest.mark.parametrize(
    ("rule", "measured", "stops"),
    [
        ({"worse_by": 0.05}, {"orders:1": 0.80, "orders:2": 0.76}, False),
        ({"worse_by": 0.05}, {"orders:1": 0.80, "orders:2": 0.74}, True),
        ({"worse_by": 0.05, "higher_is_better": False}, {"orders:1": 0.10, "orders:2": 0.16}, True),
        ({"worse_by": 0.05, "higher_is_better": False}, {"orders:1": 0.16, "orders:2": 0.10}, False),
        ({"worse_by": 0.05}, {"orders:1": 0.80, "orders:2": float("nan")}, True),
        ({"worse_by": 0.05, "exposures": 51}, {"orders:1": 0.80, "orders:2": 0.1}, False),
    ],
)
def test_the_guardrail_gives_everything_to_the_control(
    shop: Registry, rule: dict[str, Any], measured: dict[str, float], stops: bool
) -> None:
    watched = Guardrail(metric="rating", **({"exposures": 50} | rule))
    start_experiment(shop, "shop", "first", {"orders:2": 5000}, actor="dan", guardrail=watched)
    count(shop, orders_1=50, orders_2=50)
    with shop.database.writing() as session:
        experiment = find_experiment(session, find_surface(session, "shop"))
        assert bool(check_guardrail(session, experiment, measured, actor="watch")) == stops
        with pytest.raises(RegistryError, match="orders:2 is missing"):
            check_guardrail(session, experiment, {"orders:1": 1.0}, actor="watch")
    assert shares(shop) == ({"orders:1": 10_000} if stops else {"orders:1": 5000, "orders:2": 5000})


def test_exposures_that_do_not_fit_the_shares_are_told(shop: Registry) -> None:
    start_experiment(shop, "shop", "first", {"orders:2": 5000}, actor="dan")
    count(shop, orders_1=5050, orders_2=4950)
    assert not status(shop)["is_mismatched"]
    count(shop, orders_1=450)
    assert status(shop)["is_mismatched"]
    with pytest.raises(RegistryError, match="no arm"):
        count(shop, orders_3=1)


def test_an_arm_that_is_withdrawn_ends_its_experiment(any_shop: Registry) -> None:
    start_experiment(any_shop, "shop", "first", {"orders:2": 5000}, actor="dan")
    with any_shop.database.writing() as session:
        with pytest.raises(RefusedError, match="serves shop"):
            retire(session, find_version(session, "orders:2"), actor="dan")
        assert retire(session, find_version(session, "orders:2"), actor="dan", drain=True) == ["shop"]
    assert shares(any_shop) == {"orders:1": 10_000}
    start_experiment(any_shop, "shop", "second", {"orders:3": 5000}, actor="dan")
    with any_shop.database.writing() as session:
        assert undeploy(session, find_version(session, "orders:1"), actor="dan") == ["shop"]
        assert running_experiment(session, find_surface(session, "shop")) is None
    assert shares(any_shop) == {}


def test_the_split_that_servers_are_told_is_the_one_that_routes(shop: Registry) -> None:
    experiment = start_experiment(shop, "shop", "first", {"orders:2": 2500, "orders:3": 2500}, actor="dan")
    with shop.database.reading() as session:
        split = split_of(session, session.get_one(type(experiment), experiment.id))
        assert {unit: f"orders:{split.arm(unit)}" for unit in UNITS} == routed(shop)
