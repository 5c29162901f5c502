"""Around an answer: what is let in, what is written down at each kind of end, and what stops it."""

import asyncio
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tests.gateway_scene import KEY, ScriptedBackend, caller, surface, until, version, view

from luthier.core.errors import (
    AdapterFormatError,
    AdapterStateError,
    BaseMismatchError,
    BlobError,
    EngineError,
    LuthierError,
    QueueFullError,
    RefusedError,
    RequestError,
)
from luthier.engine.requests import Sampling
from luthier.registry.tenancy import Quotas
from luthier.registry.view import ServingView
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway, Route, refusal_of
from luthier.serve.ledger import Answered, Ledger
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews


class Scene:
    """A gateway over a scripted engine, and what its ledger was told."""

    def __init__(self, folder: Path, what: ServingView):
        self.backend = ScriptedBackend()
        self.told: list[Answered] = []
        self.ledger = Ledger(folder / "usage", _Nobody())
        record = self.ledger.record

        def listening(answer: Answered) -> None:
            self.told.append(answer)
            record(answer)

        self.ledger.record = listening  # type: ignore[method-assign]
        self.gateway = Gateway(ServeSettings(served_name="base"), self.backend, None, FixedViews(what), ledger=self.ledger)

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run a test's steps with the gateway's life around them."""

        async def life() -> None:
            await self.gateway.views.start(self.gateway.residency.take)
            self.gateway.residency.start()
            try:
                await scenario
            finally:
                await self.gateway.residency.close()

        asyncio.run(life())

    def route(self, name: str = "base", **more: Any) -> Route:
        """Route a request of the tenant."""
        return self.gateway.route(self.gateway.caller(f"Bearer {KEY}"), name, **more)

    async def ask(self, route: Route, tokens: int = 3, *, leave_after: int | None = None, **more: Any) -> int:
        """Ask, and leave after so many events; return how many came."""
        who, seen = self.gateway.caller(f"Bearer {KEY}"), 0
        async with aclosing(self.gateway.stream(who, route, (1, 2, 3, 4), Sampling(max_new_tokens=tokens), **more)) as events:
            async for _ in events:
                seen += 1
                if seen == leave_after:
                    break
        return seen


class _Nobody:
    """Books that are not reached."""

    def add(self, answers: Any) -> None:
        """Raise."""
        raise OSError("away")

    def tokens_of(self, day: Any) -> Any:
        """Raise."""
        raise OSError("away")


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path, view(1, shop=surface(1, {1: 7000, 2: 3000}), **{"orders:3": version(3)}))


def test_an_answer_is_written_down_before_its_last_piece_is_given_out(scene: Scene) -> None:
    async def scenario() -> None:
        who = scene.gateway.caller(f"Bearer {KEY}")
        async for event in scene.gateway.stream(who, scene.route(), (1, 2), Sampling(max_new_tokens=3), request_id="r1"):
            assert bool(scene.told) == (event.completion is not None)

    scene.run(scenario())
    [answer] = scene.told
    assert (answer.request_id, answer.status, answer.prompt_tokens, answer.completion_tokens) == ("r1", "length", 2, 3)
    assert (answer.tenant_id, answer.key_id, answer.model, answer.version_id) == (1, 1, "base", None)


def test_who_leaves_pays_for_what_was_made(scene: Scene) -> None:
    scene.run(_all(scene.ask(scene_route(scene), 5, leave_after=2)))
    [answer] = scene.told
    assert (answer.status, answer.prompt_tokens, answer.completion_tokens) == ("cancelled", 4, 2)
    assert scene.backend.num_open == 0 and scene.gateway.limits.running == 0


def scene_route(scene: Scene, name: str = "base") -> Route:
    scene.gateway.residency.view = scene.gateway.views.current()
    return scene.route(name)


async def _all(*asked: Any) -> None:
    await asyncio.gather(*asked)


def test_who_is_cancelled_before_the_first_token_pays_for_the_prompt(scene: Scene) -> None:
    async def scenario() -> None:
        scene.backend.tokens = asyncio.Queue()
        asking = asyncio.create_task(scene.ask(scene.route()))
        await until(lambda: scene.backend.num_open == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    scene.run(scenario())
    [answer] = scene.told
    assert (answer.status, answer.prompt_tokens, answer.completion_tokens) == ("cancelled", 4, 0)
    assert scene.gateway.limits.running == 0


@pytest.mark.parametrize(
    ("error", "status", "is_written"),
    [
        (EngineError("died"), 503, True),
        (AdapterFormatError("cut short"), 409, True),
        (QueueFullError("the queue", 9, 9), 429, False),
        (RequestError("too long"), 400, False),
        (OSError("no such host"), 503, True),
    ],
)
def test_a_failure_costs_nothing_and_is_written_down_unless_it_is_a_refusal(
    scene: Scene, error: Exception, status: int, is_written: bool
) -> None:
    async def scenario() -> None:
        scene.backend.failing["orders:3"] = error
        with pytest.raises(ApiError) as caught:
            await scene.ask(scene.route("orders:3"))
        assert caught.value.status == status
        assert ("Retry-After" in caught.value.headers) == (status in (429, 503))

    scene.run(scenario())
    assert [(answer.status, answer.tokens) for answer in scene.told] == [("error", 0)] * is_written
    assert scene.gateway.limits.running == 0


def test_several_answers_to_one_prompt_pay_for_it_once(scene: Scene) -> None:
    async def scenario() -> None:
        route = scene.route()
        await asyncio.gather(*(scene.ask(route, request_id=f"r.{n}", is_further=n > 0) for n in range(3)))

    scene.run(scenario())
    assert sorted(answer.prompt_tokens for answer in scene.told) == [0, 0, 4]


def test_what_was_reserved_and_not_used_may_be_used(tmp_path: Path) -> None:
    scene = Scene(tmp_path, view(1, callers={KEY: caller(quotas=Quotas(tokens_per_minute=24))}))

    async def scenario() -> None:
        route = scene.route()
        await scene.ask(route, 20, leave_after=1)  # reserves 24, takes 5
        await scene.ask(route, 15)  # 19
        with pytest.raises(ApiError) as caught:
            await scene.ask(route, 1)
        assert caught.value.status == 429

    scene.run(scenario())


def test_draining_takes_nothing_new_and_lets_answers_end(scene: Scene) -> None:
    async def scenario() -> None:
        scene.backend.tokens = asyncio.Queue()
        asking = asyncio.create_task(scene.ask(scene.route(), 2))
        await until(lambda: scene.backend.num_open == 1)
        scene.gateway.drain()
        with pytest.raises(ApiError) as caught:
            await scene.ask(scene.route())
        assert caught.value.status == 503
        assert await scene.gateway.unready_because() == ["the server is being drained"]
        for token in (1, 2):
            scene.backend.tokens.put_nowait(token)
        assert await asking == 2

    scene.run(scenario())
    assert [answer.status for answer in scene.told] == ["length"]


def test_an_answer_ends_when_its_version_is_put_on_hold(scene: Scene) -> None:
    async def scenario() -> None:
        scene.backend.tokens = asyncio.Queue()
        asking = asyncio.create_task(scene.ask(scene.route("orders:3"), 5))
        await until(lambda: scene.backend.num_open == 1)
        scene.backend.tokens.put_nowait(1)
        await until(lambda: scene.backend.tokens is not None and scene.backend.tokens.empty())
        scene.gateway.residency.take(view(2, held=("orders:3",)))
        scene.backend.tokens.put_nowait(2)
        with pytest.raises(ApiError) as caught:
            await asking
        assert caught.value.status == 409

    scene.run(scenario())
    assert [(answer.status, answer.completion_tokens) for answer in scene.told] == [("held", 1)]
    assert scene.backend.num_open == 0


def test_readiness_gives_reasons_and_no_names(scene: Scene) -> None:
    async def scenario() -> None:
        assert await scene.gateway.unready_because() == ["adapters are being read"]
        await until(lambda: not scene.gateway.residency.is_starting)
        assert await scene.gateway.unready_because() == []
        scene.backend.away = "the engine of tenant acme died over /secret/orders"
        assert await scene.gateway.unready_because() == ["the engine does not answer"]

    scene.run(scenario())


def test_an_arm_is_recorded_with_its_unit_and_the_control_without_one(scene: Scene) -> None:
    async def scenario() -> None:
        who = scene.gateway.caller(f"Bearer {KEY}")
        for user in ("a", "b", None):
            unit = scene.gateway.unit_of(who, "shop", user=user, session="s")
            await scene.ask(scene.route("shop", unit=unit))

    scene.run(scenario())
    first, second, nobody = scene.told
    assert (nobody.version_id, nobody.experiment_id, nobody.unit_digest) == (1, None, None)
    assert first.unit_digest != second.unit_digest and (first.experiment_id, first.epoch) == (1, 1)


@pytest.mark.parametrize(("unit", "expected"), [("user", "acme/u"), ("session", "acme/s"), ("tenant", "acme"), ("planet", None)])
def test_the_unit_is_what_the_experiment_counts(tmp_path: Path, unit: str, expected: str | None) -> None:
    scene = Scene(tmp_path, view(1, shop=surface(1, {1: 5000, 2: 5000}, unit=unit)))

    async def scenario() -> None:
        who = scene.gateway.caller(f"Bearer {KEY}")
        assert scene.gateway.unit_of(who, "shop", user="u", session="s") == expected
        assert scene.gateway.unit_of(who, "base", user="u", session="s") is None

    scene.run(scenario())


SECRET = "/srv/tenants/rival/adapters/orders"


@pytest.mark.parametrize(
    "error",
    [kind(f"{SECRET}: cut short") for kind in (AdapterFormatError, BaseMismatchError, BlobError, RefusedError, AdapterStateError)]
    + [EngineError(SECRET), LuthierError(SECRET)],
)
def test_what_is_told_to_tenants_names_no_files(error: LuthierError) -> None:
    refusal = refusal_of(error)
    assert refusal.status in (409, 503, 500)
    assert "/srv" not in refusal.message and "rival" not in str(refusal.body())
