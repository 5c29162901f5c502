"""A/B through the gateway: shares, stickiness, borders, units that are counted once, and a guardrail that stops a bad arm."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.gateway_scene import KEY, ScriptedBackend, surface, until, view
from tests.registry_rows import add_base, key_for, ready_version, surface_for, tenant_for

from luthier.engine.requests import Sampling
from luthier.registry.audit import events
from luthier.registry.experiments import (
    Guardrail,
    change_weights,
    experiment_status,
    find_experiment,
    running_experiment,
    start_experiment,
)
from luthier.registry.place import Registry, open_registry
from luthier.registry.promotion import promote
from luthier.registry.surfaces import find_surface
from luthier.registry.view import SurfaceTarget, read_view
from luthier.serve.app import make_app
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews
from luthier.serve.watched import watched_gateway

USERS = 100_000


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry whose surface `shop` is served by orders:1, and orders:2 may serve it too."""
    opened = open_registry(tmp_path / "registry", create=True)
    add_base(opened)
    surface_for(opened)
    for _ in range(2):
        ready_version(opened)
    promote(opened, "orders:1", "shop", actor="dan")
    tenant_for(opened, "acme", ("surface", "shop"))
    yield opened
    opened.database.engine.dispose()


def routed(weights: dict[int, int]) -> dict[int, str]:
    """Return which version answers each of many users, through the gateway."""

    async def scenario() -> dict[int, str]:
        gateway = Gateway(
            ServeSettings(served_name="base"), ScriptedBackend(), None, FixedViews(view(1, shop=surface(1, weights)))
        )
        await gateway.views.start(gateway.residency.take)
        who = gateway.caller(f"Bearer {KEY}")
        found = {user: str(gateway.route(who, "shop", unit=gateway.unit_of(who, "shop", user=f"user-{user}")).adapter)
                 for user in range(USERS)}  # fmt: skip
        await gateway.residency.close()
        return found

    return asyncio.run(scenario())


def test_thirty_per_cent_of_users_are_thirty_per_cent_and_stay_where_they_are() -> None:
    first = routed({1: 7000, 2: 3000})
    share = Counter(first.values())["orders:2"] / USERS
    assert abs(share - 0.300) <= 0.005
    assert routed({1: 7000, 2: 3000}) == first  # another gateway, another life

    wider = routed({1: 6000, 2: 4000})
    moved = {(first[user], wider[user]) for user in first if first[user] != wider[user]}
    assert moved == {("orders:1", "orders:2")}
    assert abs(sum(first[user] != wider[user] for user in first) / USERS - 0.100) <= 0.005


async def answer(gateway: Gateway, key: str, user: str, request_id: str) -> str:
    """Have a user answered, and return the version that did."""
    who = gateway.caller(f"Bearer {key}")
    route = gateway.route(who, "shop", unit=gateway.unit_of(who, "shop", user=user))
    async for _ in gateway.stream(who, route, (1,), Sampling(max_new_tokens=1), request_id=request_id):
        pass
    return str(route.adapter)


def status(registry: Registry) -> dict[str, Any]:
    with registry.database.reading() as session:
        return experiment_status(session, find_experiment(session, find_surface(session, "shop"), "first"))


def settings(folder: Path) -> ServeSettings:
    return ServeSettings(served_name="base", state=folder, refresh_seconds=0.02)


def test_a_unit_is_counted_once_in_an_epoch_over_restarts_and_gateways(registry: Registry, tmp_path: Path) -> None:
    key = key_for(registry)
    start_experiment(registry, "shop", "first", {"orders:2": 3000}, actor="dan")

    async def life(state: str, users: range) -> Counter[str]:
        gateway = watched_gateway(settings(tmp_path / state), ScriptedBackend(), None, registry)
        await gateway.start()
        seen = {user: await answer(gateway, key, f"u{user}", f"{state}-{user}-{again}") for again in range(2) for user in users}
        await gateway.close()
        return Counter(seen.values())

    asyncio.run(life("one", range(60)))
    asyncio.run(life("one", range(60)))
    asyncio.run(life("two", range(30, 90)))
    expected = asyncio.run(life("three", range(90)))
    told = status(registry)
    assert {name: arm["exposures"] for name, arm in told["arms"].items()} == expected
    assert sum(expected.values()) == 90 and not told["is_mismatched"]

    change_weights(registry, "shop", {"orders:2": 5000}, actor="dan")
    expected = asyncio.run(life("one", range(40)))
    assert {name: arm["exposures"] for name, arm in status(registry)["arms"].items()} == expected


def test_a_bad_arm_is_stopped_while_it_is_served(registry: Registry, tmp_path: Path) -> None:
    key = key_for(registry)
    rule = Guardrail(metric="thumbs", worse_by=0.1, exposures=20)
    start_experiment(registry, "shop", "first", {"orders:2": 5000}, actor="dan", guardrail=rule)

    async def scenario() -> None:
        gateway = watched_gateway(settings(tmp_path / "state"), ScriptedBackend(), None, registry, guard_seconds=0.05)
        await gateway.start()
        server = httpx.ASGITransport(app=make_app(gateway))
        async with httpx.AsyncClient(transport=server, base_url="http://x", headers={"Authorization": f"Bearer {key}"}) as client:

            async def say(request_id: str, value: float) -> None:
                said = {"completion_id": request_id, "metric": "thumbs", "value": value}
                kept = await client.post("/v1/feedback", json=said)
                assert kept.status_code == 200, kept.text

            for user in range(60):  # who like the control, and not the arm
                version = await answer(gateway, key, f"u{user}", f"r-{user}")
                await say(f"r-{user}", 1.0 if version == "orders:1" else 0.0)
            await say("nobody's", -1e9)
            await until(lambda: gateway.view().names[1]["shop"] == alone)
            assert {await answer(gateway, key, f"u{user}", f"after-{user}") for user in range(20)} == {"orders:1"}
        await gateway.close()

    with registry.database.reading() as session:
        assert running_experiment(session, find_surface(session, "shop")) is not None
        target = read_view(session, base_name="base").names[1]["shop"]
        assert isinstance(target, SurfaceTarget) and target.arms is not None
        alone = replace(target, arms=None)
    asyncio.run(scenario())
    with registry.database.reading() as session:
        [stopped] = events(session, action="experiment.stop")
        assert stopped.actor.startswith("gateway/")
        assert running_experiment(session, find_surface(session, "shop")) is None
