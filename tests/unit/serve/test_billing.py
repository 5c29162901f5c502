"""From an HTTP request to its row in the registry: ids that clients know, units of experiments, prompts paid once, limits."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from tests.gateway_scene import ScriptedBackend, until
from tests.registry_rows import add_base, key_for, ready_version, surface_for, tenant_for

from luthier.registry.experiments import start_experiment
from luthier.registry.place import Registry, open_registry
from luthier.registry.promotion import promote
from luthier.registry.schema_serving import ExposureUnit, UsageEvent
from luthier.registry.split import Split, unit_digest
from luthier.registry.tenancy import Quotas
from luthier.registry.tenants import find_tenant, set_quotas
from luthier.serve.app import make_app
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.watched import watched_gateway

Scenario = Callable[[httpx.AsyncClient, Gateway], Coroutine[Any, Any, None]]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry whose tenant may call the base, and the surface `shop` with an experiment that counts sessions."""
    opened = open_registry(tmp_path / "registry", create=True)
    add_base(opened)
    surface_for(opened)
    for _ in range(2):
        ready_version(opened)
    promote(opened, "orders:1", "shop", actor="dan")
    start_experiment(opened, "shop", "first", {"orders:2": 5000}, actor="dan", unit="session", salt="pepper")
    tenant_for(opened, "acme", ("base", ""), ("surface", "shop"))
    yield opened
    opened.database.engine.dispose()


@pytest.fixture
def run(registry: Registry, tmp_path: Path, tiny_tokenizer: Any) -> Callable[[Scenario], None]:
    """Return what runs a scenario against a gateway over HTTP, and waits until all usage has been sent."""

    key = key_for(registry)

    async def life(scenario: Scenario) -> None:
        settings = ServeSettings(served_name="base", state=tmp_path / "state", refresh_seconds=0.02)
        gateway = watched_gateway(settings, ScriptedBackend(), tiny_tokenizer, registry)
        await gateway.start()
        transport, headers = httpx.ASGITransport(app=make_app(gateway)), {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            await scenario(client, gateway)
        await gateway.close()

    return lambda scenario: asyncio.run(life(scenario))


def rows(registry: Registry) -> dict[str, UsageEvent]:
    with registry.database.reading() as session:
        return {row.request_id: row for row in session.scalars(select(UsageEvent))}


def chat(model: str = "base", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "hm"}], "max_tokens": 3} | more


def test_the_id_of_an_answer_is_the_id_of_its_usage(run: Any, registry: Registry) -> None:
    told: dict[str, dict[str, int]] = {}

    async def scenario(client: httpx.AsyncClient, _: Gateway) -> None:
        for body in (chat(), chat(n=3)):
            answer = await client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            told[answer.json()["id"]] = answer.json()["usage"]

    run(scenario)
    found = rows(registry)
    assert sorted(found) == sorted([*told, *(f"{[*told][1]}.{number}" for number in (1, 2))])
    for id, usage in told.items():
        of_it = [row for request_id, row in found.items() if request_id.startswith(id)]
        assert sum(row.prompt_tokens for row in of_it) == usage["prompt_tokens"]
        assert sum(row.completion_tokens for row in of_it) == usage["completion_tokens"]
        assert {row.status for row in of_it} == {"length"}


def test_a_session_sees_one_arm_and_is_counted_by_it(run: Any, registry: Registry) -> None:
    versions: dict[str, set[str]] = {}

    async def scenario(client: httpx.AsyncClient, _: Gateway) -> None:
        for number in range(12):
            for _ in range(2):
                headers = {"X-Session-Id": f"s{number}"}
                answer = await client.post("/v1/chat/completions", json=chat("shop", user="everybody"), headers=headers)
                versions.setdefault(f"acme/s{number}", set()).add(answer.headers["x-luthier-version"])
        answer = await client.post("/v1/chat/completions", json=chat("shop", user="everybody"))
        assert answer.headers["x-luthier-version"] == "orders:1"

    run(scenario)
    split = Split("pepper", {1: 5000, 2: 5000})
    assert versions == {unit: {f"orders:{split.arm(unit)}"} for unit in versions}
    with registry.database.reading() as session:
        counted = {bytes(row.unit_digest): row.version_id for row in session.scalars(select(ExposureUnit))}
    assert counted == {unit_digest("pepper", unit): split.arm(unit) for unit in versions}
    assert sum(row.experiment_id is None for row in rows(registry).values()) == 1


def test_limits_are_told_in_headers_and_hold(run: Any, registry: Registry) -> None:
    with registry.database.writing() as session:
        set_quotas(session, find_tenant(session, "acme"), Quotas(requests_per_minute=2, tokens_per_minute=5000), actor="ada")

    async def scenario(client: httpx.AsyncClient, gateway: Gateway) -> None:
        first = await client.post("/v1/chat/completions", json=chat())
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        stream = await client.post("/v1/chat/completions", json=chat(stream=True))
        assert stream.headers["x-ratelimit-remaining-requests"] == "0"
        refused = await client.post("/v1/chat/completions", json=chat())
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["Retry-After"]) <= 61
        assert refused.headers.get_list("x-ratelimit-remaining-requests") == ["0"]
        with registry.database.writing() as session:
            set_quotas(session, find_tenant(session, "acme"), Quotas(tokens_per_day=10), actor="ada")
        await until(lambda: gateway.caller(client.headers["authorization"]).quotas.tokens_per_day == 10)
        never = await client.post("/v1/chat/completions", json=chat())
        assert (never.status_code, never.json()["error"]["code"]) == (400, "tokens_over_quota")

    run(scenario)
    assert len(rows(registry)) == 2


def test_a_days_quota_outlives_the_server(run: Any, registry: Registry) -> None:
    used = 0

    async def first(client: httpx.AsyncClient, _: Gateway) -> None:
        nonlocal used
        used = (await client.post("/v1/chat/completions", json=chat())).json()["usage"]["total_tokens"]

    run(first)
    with registry.database.writing() as session:
        set_quotas(session, find_tenant(session, "acme"), Quotas(tokens_per_day=2 * used - 1), actor="ada")

    async def second(client: httpx.AsyncClient, gateway: Gateway) -> None:
        await until(lambda: gateway.limits._use(1).recorded == used)
        refused = await client.post("/v1/chat/completions", json=chat())
        assert refused.status_code == 429 and "day" in refused.json()["error"]["message"]
        assert int(refused.headers["Retry-After"]) <= 24 * 3600

    run(second)
