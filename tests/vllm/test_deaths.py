"""Who dies, and what the others do: vLLM's server and its engine, by kill -9 and under load."""

import asyncio
import os
import signal
import time

import pytest
from tests.vllm.listening import tree

from luthier.core.errors import EngineError
from luthier.engine.requests import Sampling
from luthier.serve.backend import Ask

LONG = Sampling(max_new_tokens=200, ignore_eos=True)


async def drain(backend, ask: Ask) -> str:
    try:
        async for _ in backend.stream(ask):
            pass
    except EngineError:
        return "503"
    return "answered"


async def until(condition, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_after_a_kill_under_load_the_gateway_says_503_and_comes_back(victim, scene, vllm):
    backend = vllm.backend
    _, server, *rest = tree(backend.supervisor.pid)
    engine = next(process for process in rest if "EngineCore" in " ".join([process.name(), *process.cmdline()]))
    generation = backend.supervisor.generation

    async def go():
        names = [None, *scene.adapters[:3]] * 2
        asks = [Ask(f"r{place}", (5, 6, 7 + place), name, LONG, "acme") for place, name in enumerate(names)]
        tasks = [asyncio.create_task(drain(backend, ask)) for ask in asks]
        await asyncio.sleep(0.5)
        os.kill((server if victim == "server" else engine).pid, signal.SIGKILL)
        told = await asyncio.gather(*tasks)
        await until(lambda: backend.supervisor.state is not None)
        down = await drain(backend, asks[0])
        await until(lambda: backend.supervisor.generation > generation and backend.supervisor.state is None)
        return told, down

    told, down = vllm.call(go())
    assert told == ["503"] * 8 and down == "503"
    for name in (None, *scene.adapters):
        prompt = scene.prompts[0]
        assert vllm.answer(prompt, name, scene.sampling).token_ids == scene.wanted[name, prompt].token_ids
    assert not any(process.is_running() for process in (server, engine))


def test_who_leaves_ends_his_request(scene, vllm):
    async def go():
        events = vllm.backend.stream(Ask("r", (5, 6), scene.adapters[0], LONG, "acme"))
        await anext(events)
        assert (await vllm.backend.stats())["scheduler"]["decoding"] == 1
        await events.aclose()
        for _ in range(100):
            if (await vllm.backend.stats())["scheduler"]["decoding"] == 0:
                return True
            await asyncio.sleep(0.1)
        return False

    assert vllm.call(go())
