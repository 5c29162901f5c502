"""Routes of those who run the server and of those who decide what goes out, over HTTP, with a registry behind them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.exc import OperationalError
from tests.gateway_scene import ScriptedBackend, until
from tests.registry_rows import add_base, add_version, approve_by, judge, key_for, ready_version, surface_for, tenant_for

from luthier.engine.requests import Sampling
from luthier.registry.audit import check_chain, events
from luthier.registry.place import Registry, open_registry
from luthier.registry.promotion import promote
from luthier.registry.tenancy import Scope
from luthier.registry.tenants import find_tenant, revoke_key
from luthier.serve.app import make_app
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.watched import watched_gateway


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Two tenants with an adapter, a surface and a version to promote each."""
    opened = open_registry(tmp_path / "registry", create=True)
    add_base(opened)
    for tenant, adapter, surface in (("acme", "orders", "shop"), ("rival", "secrets", "vault")):
        surface_for(opened, name=surface)
        for _ in range(2):
            ready_version(opened, surface, adapter)
        promote(opened, f"{adapter}:1", surface, actor="dan")
        tenant_for(opened, tenant, ("adapter", adapter), ("surface", surface))
    yield opened
    opened.database.engine.dispose()


class Http:
    """A running gateway, asked over HTTP by different keys."""

    def __init__(self, gateway: Gateway, client: httpx.AsyncClient, registry: Registry):
        self.gateway, self.client, self.registry = gateway, client, registry
        self._keys: dict[tuple[str, tuple[Scope, ...]], str] = {}

    async def __call__(self, method: str, path: str, *scopes: Scope, tenant: str = "acme", **body: Any) -> httpx.Response:
        """Send a request with a key of these scopes."""
        known = self._keys.get((tenant, scopes))
        if known is None:
            known = key_for(self.registry, tenant, "-".join(sorted(scopes)) or "ci", *scopes)
            self._keys[tenant, scopes] = known
            await self.gateway.views.refresh()  # type: ignore[attr-defined]
        sent = {"json": body} if body or method == "POST" else {}
        return await self.client.request(method, path, headers={"Authorization": f"Bearer {known}"}, **sent)


def on_http(registry: Registry, folder: Path) -> Callable[[Callable[[Http], Coroutine[Any, Any, None]]], None]:
    @asynccontextmanager
    async def running() -> AsyncIterator[Http]:
        settings = ServeSettings(served_name="base", state=folder, refresh_seconds=0.02)
        gateway = watched_gateway(settings, ScriptedBackend(), None, registry)
        await gateway.start()
        transport = httpx.ASGITransport(app=make_app(gateway))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield Http(gateway, client, registry)
        await gateway.close()

    def run(scenario: Callable[[Http], Coroutine[Any, Any, None]]) -> None:
        async def life() -> None:
            async with running() as http:
                await scenario(http)

        asyncio.run(life())

    return run


@pytest.fixture
def run(registry: Registry, tmp_path: Path) -> Callable[[Callable[[Http], Coroutine[Any, Any, None]]], None]:
    return on_http(registry, tmp_path / "state")


def served(http: Http, tenant: int, surface: str) -> str | None:
    target = http.gateway.view().names[tenant][surface]
    return target.control and target.control.reference  # type: ignore[union-attr, return-value]


def test_a_promotion_and_a_rollback_reach_the_server_and_name_the_key(run: Any, registry: Registry) -> None:
    async def scenario(http: Http) -> None:
        done = await http("POST", "/admin/promote", Scope.PROMOTE, version="orders:2", surface="shop")
        assert (done.status_code, done.json()["version"], done.json()["before"]) == (200, "orders:2", "orders:1")
        await until(lambda: served(http, 1, "shop") == "orders:2")
        done = await http("POST", "/admin/rollback", Scope.PROMOTE, surface="shop", reason="complaints")
        assert (done.status_code, done.json()["version"]) == (200, "orders:1")
        await until(lambda: served(http, 1, "shop") == "orders:1")

    run(scenario)
    with registry.database.reading() as session:
        told = [(one.action, one.actor) for one in events(session, subject="surface/shop")][-2:]
        assert told == [("surface.promote", "acme/promote"), ("surface.rollback", "acme/promote")]
        assert not check_chain(session).faults


def test_requests_go_on_through_promotions_and_rollbacks(run: Any) -> None:
    async def scenario(http: Http) -> None:
        key = key_for(http.registry, "acme", "client")
        await http.gateway.views.refresh()  # type: ignore[attr-defined]
        stop, versions = asyncio.Event(), list[str]()

        async def client() -> None:
            while not stop.is_set():
                who = http.gateway.caller(f"Bearer {key}")
                route = http.gateway.route(who, "shop")
                async for _ in http.gateway.stream(who, route, (1, 2), Sampling(max_new_tokens=3)):
                    await asyncio.sleep(0)
                versions.append(str(route.adapter))
                await asyncio.sleep(0.001)

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for _ in range(2):
            await http("POST", "/admin/promote", Scope.PROMOTE, version="orders:2", surface="shop")
            await until(lambda: versions[-1:] == ["orders:2"])
            await http("POST", "/admin/rollback", Scope.PROMOTE, surface="shop")
            await until(lambda: versions[-1:] == ["orders:1"])
        stop.set()
        await asyncio.gather(*clients)  # none of them saw a failure
        loads = [what for what in http.gateway.backend.done if what[0] == "load"]  # type: ignore[attr-defined]
        assert loads.count(("load", "orders:2")) >= 1

    run(scenario)


def test_a_rule_that_is_not_met_is_a_409_with_all_reasons(run: Any, registry: Registry) -> None:
    version = add_version(registry)

    async def scenario(http: Http) -> None:
        refused = await http("POST", "/admin/promote", Scope.PROMOTE, version=version, surface="shop")
        assert refused.status_code == 409
        assert "gate" in refused.json()["error"]["message"] and "approvals" in refused.json()["error"]["message"]

    run(scenario)


def test_approvals_by_keys_let_a_version_go_out(run: Any, registry: Registry) -> None:
    version = add_version(registry)
    judge(registry, version)
    approve_by(registry, version, "shop", "bob")

    async def scenario(http: Http) -> None:
        word = {"version": version, "surface": "shop", "comment": "looked at it"}
        done = await http("POST", "/admin/approve", Scope.APPROVE, **word)
        assert done.status_code == 200, done.text
        assert (await http("POST", "/admin/promote", Scope.PROMOTE, version=version, surface="shop")).status_code == 200

    run(scenario)
    with registry.database.reading() as session:
        assert events(session, action="version.approve")[-1].actor == "acme/approve"


def test_a_hold_takes_a_version_away_and_a_release_brings_it_back(run: Any) -> None:
    async def scenario(http: Http) -> None:
        held = await http("POST", "/admin/hold", Scope.PROMOTE, version="orders:1", reason="it insults people")
        assert held.status_code == 200
        await until(lambda: served(http, 1, "shop") is None)
        again = await http("POST", "/admin/hold", Scope.PROMOTE, version="orders:1", reason="again")
        assert again.status_code == 409
        assert (await http("POST", "/admin/release", Scope.PROMOTE, version="orders:1")).status_code == 200
        await until(lambda: served(http, 1, "shop") == "orders:1")

    run(scenario)


GOVERNING = [
    ("/admin/promote", Scope.PROMOTE, {"version": "secrets:2", "surface": "vault"}),
    ("/admin/promote", Scope.PROMOTE, {"version": "orders:2", "surface": "vault"}),
    ("/admin/promote", Scope.PROMOTE, {"version": "secrets:2", "surface": "shop"}),
    ("/admin/rollback", Scope.PROMOTE, {"surface": "vault"}),
    ("/admin/rollback", Scope.PROMOTE, {"surface": "shop", "to": "secrets:1"}),
    ("/admin/hold", Scope.PROMOTE, {"version": "secrets:1", "reason": "envy"}),
    ("/admin/release", Scope.PROMOTE, {"version": "secrets:1"}),
    ("/admin/approve", Scope.APPROVE, {"version": "secrets:1"}),
    ("/admin/approve", Scope.APPROVE, {"version": "orders:1", "surface": "vault"}),
    ("/admin/experiments/stop", Scope.PROMOTE, {"surface": "vault"}),
]


@pytest.mark.parametrize(("path", "scope", "body"), GOVERNING)
def test_what_is_another_tenants_cannot_be_told_from_what_does_not_exist(
    run: Any, path: str, scope: Scope, body: dict[str, str]
) -> None:
    def unknown(text: str) -> str:
        return text.replace("secrets", "nothing").replace("vault", "nowhere")

    async def scenario(http: Http) -> None:
        theirs = await http("POST", path, scope, **body)
        nobodys = await http("POST", path, scope, **{name: unknown(text) for name, text in body.items()})
        assert theirs.status_code == nobodys.status_code == 404
        assert unknown(theirs.text) == nobodys.text

    run(scenario)


ROUTES = [
    ("GET", "/admin/adapters", Scope.ADMIN, {}),
    ("GET", "/admin/usage", Scope.ADMIN, {}),
    ("POST", "/admin/adapters/load", Scope.ADMIN, {"adapter": "orders:1"}),
    ("POST", "/admin/adapters/unload", Scope.ADMIN, {"adapter": "orders:1"}),
    ("POST", "/admin/drain", Scope.ADMIN, {}),
    *(("POST", path, scope, body) for path, scope, body in GOVERNING),
]


@pytest.mark.parametrize(("method", "path", "scope", "body"), ROUTES)
def test_a_key_without_the_scope_may_not(run: Any, method: str, path: str, scope: Scope, body: dict[str, str]) -> None:
    async def scenario(http: Http) -> None:
        others = [one for one in Scope if one != scope]
        assert (await http(method, path, *others, **body)).status_code == 403
        assert (await http.client.request(method, path, json=body)).status_code == 401

    run(scenario)


def test_whoever_runs_the_server_sees_and_moves_adapters(run: Any) -> None:
    async def scenario(http: Http) -> None:
        await until(lambda: "orders:1" in http.gateway.residency.held)
        seen = (await http("GET", "/admin/adapters", Scope.ADMIN)).json()
        assert set(seen["held"]) >= {"orders:1", "secrets:1"} and seen["faults"] == {}
        assert (await http("POST", "/admin/adapters/load", Scope.ADMIN, adapter="orders:2")).status_code == 200
        assert "orders:2" in http.gateway.residency.held
        assert (await http("POST", "/admin/adapters/unload", Scope.ADMIN, adapter="orders:2")).status_code == 200
        assert "orders:2" not in http.gateway.residency.held
        for path in ("load", "unload"):
            gone = await http("POST", f"/admin/adapters/{path}", Scope.ADMIN, adapter="../../etc/passwd")
            assert gone.status_code == 404

    run(scenario)


def test_draining_ends_readiness(run: Any) -> None:
    async def scenario(http: Http) -> None:
        await until(lambda: not http.gateway.residency.is_starting)
        assert (await http.client.get("/health/ready")).status_code == 200
        assert (await http("POST", "/admin/drain", Scope.ADMIN)).json()["is_draining"]
        ready = await http.client.get("/health/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (503, ["the server is being drained"])
        assert (await http.client.get("/health/live")).status_code == 200

    run(scenario)


def test_usage_is_told_by_day_and_by_version(run: Any) -> None:
    async def scenario(http: Http) -> None:
        key = key_for(http.registry, "acme", "client")
        await http.gateway.views.refresh()  # type: ignore[attr-defined]
        who = http.gateway.caller(f"Bearer {key}")
        async for _ in http.gateway.stream(who, http.gateway.route(who, "shop"), (1, 2), Sampling(max_new_tokens=3)):
            pass
        ledger = http.gateway.ledger
        assert ledger is not None
        await until(lambda: ledger.sent == 1)
        told = (await http("GET", "/admin/usage", Scope.ADMIN)).json()
        assert [(one["tenant"], one["what"], one["prompt_tokens"], one["completion_tokens"]) for one in told["versions"]] == [
            ("acme", "orders:1", 2, 3)
        ]
        assert [one["requests"] for one in told["days"]] == [1]

    run(scenario)


def test_a_key_that_was_revoked_stops_working_soon(run: Any, registry: Registry) -> None:
    async def scenario(http: Http) -> None:
        assert (await http("GET", "/v1/models")).status_code == 200
        with registry.database.writing() as session:
            revoke_key(session, find_tenant(session, "acme"), "ci", actor="ada")
        async with asyncio.timeout(20):
            while (answer := await http("GET", "/v1/models")).status_code == 200:
                await asyncio.sleep(0.01)
        assert answer.status_code == 401

    run(scenario)


def test_a_registry_that_is_away_is_a_503(run: Any, registry: Registry) -> None:
    async def scenario(http: Http) -> None:
        await http("POST", "/admin/rollback", Scope.PROMOTE, surface="nowhere")  # makes its key
        access = http.gateway.registry
        assert access is not None

        def away(_: Registry) -> None:
            raise OperationalError("SELECT", {}, Exception("connection refused to postgresql://user:pw@host"))

        real = access._worker.do
        access._worker.do = lambda act, *args: real(away, registry)  # type: ignore[assignment, arg-type, method-assign]
        refused = await http("POST", "/admin/rollback", Scope.PROMOTE, surface="shop")
        assert refused.status_code == 503 and "pw@" not in refused.text

    run(scenario)


def test_servers_say_that_they_let_go_of_a_version(run: Any, registry: Registry) -> None:
    """What an erasure waits for: the deployment that ended is acknowledged once the server has unloaded the version."""
    from sqlalchemy import select

    from luthier.registry.schema import Deployment
    from luthier.registry.schema_serving import Holding

    def acknowledged() -> list[bool]:
        with registry.database.reading() as session:
            ended = session.scalars(select(Deployment).where(Deployment.ended_at.is_not(None)))
            return [one.acknowledged_at is not None for one in ended]

    def holders() -> set[int]:
        with registry.database.reading() as session:
            return set(session.scalars(select(Holding.version_id)))

    async def scenario(http: Http) -> None:
        await until(lambda: holders() == {1, 3})
        await http("POST", "/admin/promote", Scope.PROMOTE, version="orders:2", surface="shop")
        await until(lambda: holders() >= {1, 2})
        assert acknowledged() == [False]  # orders:1 may still be asked for by its name, and is in memory
        await http("POST", "/admin/hold", Scope.PROMOTE, version="orders:1", reason="it is to be erased")
        await until(lambda: acknowledged() == [True])
        assert holders() == {2, 3}

    run(scenario)
