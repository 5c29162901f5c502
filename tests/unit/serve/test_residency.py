"""Adapters of a running server: a promotion waits for the new version and not the other way round, a hold waits for nobody."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from tests.gateway_scene import Notes, ScriptedBackend, caller, surface, until, version, view

from luthier.core.errors import AdapterFormatError, EngineError
from luthier.registry.view import SurfaceTarget
from luthier.serve import residency as module
from luthier.serve.residency import Residency


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_SECONDS", 0.01)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


@asynccontextmanager
async def started(backend: ScriptedBackend, notes: Notes | None = None, **settings: Any) -> AsyncIterator[Residency]:
    residency = Residency(backend, notes, **settings)
    residency.start()
    try:
        yield residency
    finally:
        await residency.close()


def control(residency: Residency) -> str | None:
    target = residency.view.names[1]["shop"]
    assert isinstance(target, SurfaceTarget)
    return target.control and target.control.reference


def test_a_promotion_counts_once_the_new_version_is_read() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            gate = backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, shop=surface(2)))
            for _ in range(5):
                await asyncio.sleep(0.01)
                assert control(residency) == "orders:1"
            gate.set()
            await until(lambda: control(residency) == "orders:2")

    run(scenario())


def test_keys_of_a_new_view_count_while_its_versions_are_read() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, callers={"another": caller()}, shop=surface(2)))
            assert control(residency) == "orders:1"
            assert residency.view.revision == 2 and len(residency.view.callers) == 1
            assert residency.view.callers == view(2, callers={"another": caller()}).callers

    run(scenario())


def test_a_version_that_is_read_too_slowly_serves_all_the_same() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend, load_seconds=0.05) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, shop=surface(2)))
            await until(lambda: control(residency) == "orders:2")
            assert ("load", "orders:2") not in backend.done

    run(scenario())


@pytest.mark.parametrize("error", [AdapterFormatError("cut short"), EngineError("starting")])
def test_what_cannot_be_read_leaves_the_old_version_until_it_can(error: Exception) -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            backend.failing["orders:2"] = error
            residency.take(view(2, shop=surface(2)))
            await until(lambda: "orders:2" in residency.faults)
            assert control(residency) == "orders:1"
            del backend.failing["orders:2"]
            await until(lambda: control(residency) == "orders:2")
            assert residency.faults == {}

    run(scenario())


def test_a_version_on_hold_ends_at_once_whatever_is_still_read() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            use = await residency.enter(version(1))
            backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, held=("orders:1",), shop=surface(2)))
            assert control(residency) == "orders:2"
            assert use.ended_because is not None and "hold" in use.ended_because
            residency.leave(use)

    run(scenario())


def test_what_an_answer_uses_goes_when_it_has_ended_and_the_registry_hears_of_it() -> None:
    async def scenario() -> None:
        backend, notes = ScriptedBackend(), Notes()
        async with started(backend, notes) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            use = await residency.enter(version(1))
            residency.take(view(2, shop=surface(2)))
            await until(lambda: control(residency) == "orders:2")
            for _ in range(5):
                await asyncio.sleep(0.01)
                assert ("unload", "orders:1") not in backend.done and 1 in notes.held
            assert use.ended_because is None
            residency.leave(use)
            await until(lambda: notes.held == {2})
            assert backend.done[-1] == ("unload", "orders:1")

    run(scenario())


def test_what_is_named_by_anybody_stays() -> None:
    async def scenario() -> None:
        backend, notes = ScriptedBackend(), Notes()
        async with started(backend, notes) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            residency.take(view(2, shop=surface(2), **{"orders:1": version(1)}))
            await until(lambda: control(residency) == "orders:2" and notes.held == {1, 2})
            assert ("unload", "orders:1") not in backend.done

    run(scenario())


def test_a_second_promotion_takes_the_place_of_one_that_is_being_read() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, shop=surface(2)))
            residency.take(view(3, shop=surface(3)))
            await until(lambda: control(residency) == "orders:3")
            residency.take(view(4, shop=surface(2)))  # the one that was given up is read anew
            assert control(residency) == "orders:3"
            backend.gated["orders:2"].set()
            await until(lambda: control(residency) == "orders:2")

    run(scenario())


def test_every_arm_is_read_before_an_experiment_begins() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            residency.take(view(1, shop=surface(1)))
            await until(lambda: ("load", "orders:1") in backend.done)
            gate = backend.gated["orders:2"] = asyncio.Event()
            residency.take(view(2, shop=surface(1, {1: 7000, 2: 3000})))
            target = residency.view.names[1]["shop"]
            assert isinstance(target, SurfaceTarget) and target.arms is None
            gate.set()
            await until(lambda: residency.view.names[1]["shop"] == surface(1, {1: 7000, 2: 3000}))

    run(scenario())


def test_an_alias_waits_for_its_version_only_where_the_old_one_is_in_use() -> None:
    async def scenario() -> None:
        backend = ScriptedBackend()
        async with started(backend) as residency:
            names = {"orders:stable": version(1), "bills:stable": version(5, "bills")}
            residency.take(view(1, **names))
            residency.leave(await residency.enter(version(1)))
            backend.gated |= {"orders:2": asyncio.Event(), "bills:6": asyncio.Event()}
            residency.take(view(2, **{"orders:stable": version(2), "bills:stable": version(6, "bills")}))
            assert residency.view.names[1]["orders:stable"] == version(1)
            assert residency.view.names[1]["bills:stable"] == version(6, "bills")

    run(scenario())
