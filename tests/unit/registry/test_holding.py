"""Which servers hold what: a deployment that ended is acknowledged when the last server lets go, or is lost."""

from datetime import timedelta

import pytest
from sqlalchemy import select, update
from tests.registry_rows import add_base, ready_version, surface_for

from luthier.registry.columns import now
from luthier.registry.holding import LOST, note_holding, tell_holdings
from luthier.registry.place import Registry
from luthier.registry.promotion import promote
from luthier.registry.schema import Deployment
from luthier.registry.schema_serving import Holding


@pytest.fixture
def shop(any_registry: Registry) -> Registry:
    """A registry whose surface was served by version 1, and is by version 2."""
    add_base(any_registry)
    surface_for(any_registry)
    for number in (1, 2):
        promote(any_registry, ready_version(any_registry), "shop", actor="dan", expected_current=None if number == 1 else "any")
    return any_registry


def acknowledged(registry: Registry) -> dict[int, bool]:
    """Return for each version's deployment whether it is."""
    with registry.database.reading() as session:
        return {one.version_id: one.acknowledged_at is not None for one in session.scalars(select(Deployment))}


def test_the_last_server_to_let_go_acknowledges(shop: Registry) -> None:
    for server in ("a", "b"):
        note_holding(shop.database, server, 1)
        note_holding(shop.database, server, 1)  # twice is once
    assert tell_holdings(shop.database, "a", {2}) == []
    assert acknowledged(shop) == {1: False, 2: False}
    assert len(tell_holdings(shop.database, "b", {2})) == 1
    assert acknowledged(shop) == {1: True, 2: False}


def test_what_still_serves_is_never_acknowledged(shop: Registry) -> None:
    tell_holdings(shop.database, "a", set())
    assert acknowledged(shop) == {1: True, 2: False}


def test_a_server_that_was_lost_holds_nothing(shop: Registry) -> None:
    note_holding(shop.database, "lost", 1)
    assert tell_holdings(shop.database, "a", set()) == []
    with shop.database.writing() as session:
        session.execute(update(Holding).values(seen_at=now() - LOST - timedelta(seconds=1)))
    tell_holdings(shop.database, "a", set())
    assert acknowledged(shop)[1]


def test_a_server_that_tells_is_not_lost(shop: Registry) -> None:
    note_holding(shop.database, "b", 1)
    with shop.database.writing() as session:
        session.execute(update(Holding).values(seen_at=now() - LOST - timedelta(seconds=1)))
    tell_holdings(shop.database, "b", {1})
    tell_holdings(shop.database, "a", set())
    assert not acknowledged(shop)[1]
