"""The engine in a process of its own: the same answers, the same errors, and what is left when either side is killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine_scene import greedy, prompts_of, wait_until, with_adapter
from tests.served_adapters import TENSORS, cut_short, save_random_adapter
from tests.tiny_run import save_tiny_model
from transformers import AutoModelForCausalLM

from luthier.adapt import detach
from luthier.core import errors
from luthier.core.errors import AdapterFormatError, DataError, EngineError, ModelError, QueueFullError, RequestError
from luthier.engine.requests import Constraint, Sampling
from luthier.serve.backend import Ask
from luthier.serve.process import ProcessBackend
from luthier.serve.settings import EngineSettings

STOPS = [1, 2]


class Scene:
    """A tiny base and two adapters in folders, what transformers and PEFT answer, and a loop in a thread for backends."""

    def __init__(self, folder: Path, tiny_llama: Callable[..., Any], tokenizer: Any):
        self.model = save_tiny_model(folder / "base", tiny_llama, tokenizer)
        self.adapters = {}
        for seed, name in enumerate(("one", "two")):
            model = AutoModelForCausalLM.from_pretrained(self.model)
            self.adapters[name] = save_random_adapter(folder / name, model, seed)
            detach(model)
        self.tokenizer = tokenizer
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._numbers = iter(range(10**9))

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    def settings(self, **more: Any) -> EngineSettings:
        adapters = {name: str(folder) for name, folder in self.adapters.items()} | more.pop("adapters", {})
        return EngineSettings(**{"model": str(self.model), "dtype": "float32", "adapters": adapters} | more)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(120)

    def backend(self, **more: Any) -> ProcessBackend:
        backend = ProcessBackend(self.settings(**more), threads=1, pause_seconds=0.1)
        self.run(backend.start())
        return backend

    def ask(self, prompt: list[int], adapter: str | None, tokens: int = 12, **sampling: Any) -> Ask:
        return Ask(f"r{next(self._numbers)}", tuple(prompt), adapter, Sampling(max_new_tokens=tokens, **sampling), "t")

    def wanted(self, prompt: list[int], adapter: str | None, tokens: int = 12) -> tuple[int, ...]:
        model = with_adapter(AutoModelForCausalLM.from_pretrained(self.model), self.adapters.get(adapter))
        return greedy(model, prompt, tokens, STOPS)[0]


async def events_of(backend: ProcessBackend, ask: Ask) -> list[Any]:
    return [event async for event in backend.stream(ask)]


@pytest.fixture(scope="module")
def scene(tmp_path_factory, tiny_llama, tiny_tokenizer) -> Iterator[Scene]:
    scene = Scene(tmp_path_factory.mktemp("process"), tiny_llama, tiny_tokenizer)
    yield scene
    scene.close()


@pytest.fixture(scope="module")
def backend(scene: Scene) -> Iterator[ProcessBackend]:
    backend = scene.backend(max_queue=3, max_running=2)
    yield backend
    scene.run(backend.close())


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; one that nobody waited for yet has, too."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_answers_are_those_of_transformers(scene: Scene, backend: ProcessBackend) -> None:
    prompts = prompts_of([5, 9, 17], seed=3)
    names = [None, "one", "two"]

    async def all_at_once() -> list[list[Any]]:
        asks = [scene.ask(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
        return await asyncio.gather(*(events_of(backend, ask) for ask in asks))

    answers = scene.run(all_at_once())
    wanted = [scene.wanted(prompt, name) for prompt, name in zip(prompts, names, strict=True)]
    assert len(set(wanted)) == 3
    for events, tokens, prompt in zip(answers, wanted, prompts, strict=True):
        completion = events[-1].completion
        assert completion.token_ids == tokens
        assert completion.prompt_tokens == len(prompt)
        assert tuple(token for event in events for token in event.token_ids) == tokens
        assert (
            "".join(event.text for event in events) == completion.text == scene.tokenizer.decode(tokens, skip_special_tokens=True)
        )
        assert 0 <= completion.queue_seconds <= completion.first_token_seconds <= completion.seconds
        assert all(event.completion is None for event in events[:-1])


def test_log_probabilities_cross(scene: Scene, backend: ProcessBackend) -> None:
    [prompt] = prompts_of([7], seed=4)
    events = scene.run(events_of(backend, scene.ask(prompt, None, 6, logprobs=2)))
    tokens, values = greedy(AutoModelForCausalLM.from_pretrained(scene.model), prompt, 6, STOPS)
    told = events[-1].completion.logprobs
    assert [each.token for each in told] == list(tokens)
    assert [each.logprob for each in told] == pytest.approx(values, abs=1e-4)
    assert all(each.alternatives[0][0] == each.token and len(each.alternatives) == 2 for each in told)


def test_a_form_crosses(scene: Scene, backend: ProcessBackend) -> None:
    [prompt] = prompts_of([7], seed=5)
    ask = scene.ask(prompt, "one", 20, constraint=Constraint(choice=("glue", "plane")))
    assert scene.run(events_of(backend, ask))[-1].completion.text in {"glue", "plane"}


def test_errors_cross_as_what_they_are(scene: Scene, backend: ProcessBackend, tmp_path: Path) -> None:
    def failure(ask: Ask) -> BaseException:
        with pytest.raises(errors.LuthierError) as caught:
            scene.run(events_of(backend, ask))
        return caught.value

    assert type(failure(scene.ask([10**6], None))) is DataError
    assert "token 1000000 is not the model's" in str(failure(scene.ask([10**6], None)))
    assert type(failure(scene.ask([5] * 250, None, 100))) is RequestError
    assert type(failure(scene.ask([5], str(tmp_path / "nothing")))) is AdapterFormatError
    with pytest.raises(AdapterFormatError, match="nothing"):
        scene.run(backend.load(str(tmp_path / "nothing")))
    assert scene.run(backend.state()) is None


def test_a_full_queue_says_how_full(scene: Scene, backend: ProcessBackend) -> None:
    async def too_many() -> list[Any]:
        asks = [scene.ask([5, 6, 7], None, 200, ignore_eos=True) for _ in range(12)]
        return await asyncio.gather(*(events_of(backend, ask) for ask in asks), return_exceptions=True)

    found = scene.run(too_many())
    refused = [each for each in found if isinstance(each, QueueFullError)]
    assert refused and all(each.limit == 3 and each.waiting >= 3 and "full" in str(each) for each in refused)
    done = [each for each in found if not isinstance(each, QueueFullError)]
    assert done and all(each[-1].completion.finish_reason == "length" for each in done)


def test_who_leaves_stops_the_answer(scene: Scene, backend: ProcessBackend) -> None:
    async def leave() -> None:
        stream = backend.stream(scene.ask([5, 6, 7], "two", 240, ignore_eos=True))
        assert (await anext(stream)).completion is None
        await stream.aclose()

    before = scene.run(backend.stats()).get("ended_cancelled", 0)
    scene.run(leave())
    wait_until(lambda: scene.run(backend.stats()).get("ended_cancelled", 0) == before + 1)


def test_unloading_gives_back(scene: Scene, backend: ProcessBackend) -> None:
    def states() -> dict[str, str]:
        return {each["name"]: each["state"] for each in scene.run(backend.stats())["adapters"]["adapters"]}

    scene.run(backend.load("one"))
    assert states()["one"] == "resident"
    scene.run(backend.unload("one"))
    assert "one" not in states()
    scene.run(backend.unload("never seen"))


def test_a_killed_engine_fails_what_runs_and_comes_back(scene: Scene) -> None:
    backend = scene.backend()
    [prompt] = prompts_of([9], seed=6)
    scene.run(backend.load("two"))
    first = backend.pid

    async def killed() -> list[BaseException]:
        streams = [backend.stream(scene.ask(prompt, name, 240, ignore_eos=True)) for name in (None, "one", "two")]
        for stream in streams:
            await anext(stream)
        os.kill(first, signal.SIGKILL)

        async def rest(stream: Any) -> BaseException | None:
            try:
                async for _ in stream:
                    pass
            except EngineError as error:
                return error
            return None

        return await asyncio.gather(*map(rest, streams))

    for error in scene.run(killed()):
        assert "SIGKILL" in str(error) and "started again" in str(error)
    with pytest.raises(EngineError, match="started again"):
        scene.run(events_of(backend, scene.ask(prompt, None)))
    assert "SIGKILL" in scene.run(backend.state())
    wait_until(lambda: scene.run(backend.state()) is None, 60)
    assert backend.pid != first
    wait_until(lambda: any(each["state"] == "resident" for each in scene.run(backend.stats())["adapters"]["adapters"]))
    assert scene.run(events_of(backend, scene.ask(prompt, "one")))[-1].completion.token_ids == scene.wanted(prompt, "one")
    assert scene.run(backend.stats())["restarts"] == 1
    second = backend.pid
    scene.run(backend.close())
    assert is_gone(second)


def test_closing_cancels_what_runs(scene: Scene) -> None:
    backend = scene.backend()

    async def close() -> list[Any]:
        stream = backend.stream(scene.ask([5, 6, 7], "one", 240, ignore_eos=True))
        events = [await anext(stream)]
        closing = asyncio.create_task(backend.close())
        events += [event async for event in stream]
        await closing
        return events

    assert scene.run(close())[-1].completion.finish_reason == "cancelled"
    with pytest.raises(EngineError, match="closed"):
        scene.run(events_of(backend, scene.ask([5], None)))


def test_a_base_that_cannot_be_loaded_is_told(scene: Scene, tmp_path: Path) -> None:
    def started(model: Path) -> None:
        scene.run(ProcessBackend(scene.settings(model=str(model)), threads=1).start())

    def engines() -> set[int]:
        return {each.pid for each in psutil.Process().children() if "luthier.serve.worker" in each.cmdline()}

    before = engines()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty"):
        started(tmp_path / "empty")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in scene.model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        started(broken)
    assert engines() == before


def test_progress_and_facts_are_told(scene: Scene) -> None:
    said: list[str] = []
    backend = ProcessBackend(scene.settings(max_running=5), progress=said.append, threads=1)
    scene.run(backend.start())
    scene.run(backend.close())
    assert any("float32, as requested" in each for each in said)
    assert backend.facts["max_running"] == 5 and backend.facts["threads"] == 1
    assert Path(backend.facts["path"]) == scene.model


def test_an_adapter_that_is_damaged_leaves_the_others_alone(scene: Scene, backend: ProcessBackend, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in scene.adapters["one"].iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    cut_short(damaged)
    assert (damaged / TENSORS).stat().st_size < (scene.adapters["one"] / TENSORS).stat().st_size
    [prompt] = prompts_of([6], seed=8)

    async def both() -> list[Any]:
        asks = [scene.ask(prompt, str(damaged)), scene.ask(prompt, "two")]
        return await asyncio.gather(*(events_of(backend, ask) for ask in asks), return_exceptions=True)

    bad, good = scene.run(both())
    assert isinstance(bad, AdapterFormatError)
    assert good[-1].completion.token_ids == scene.wanted(prompt, "two")


GATEWAY = """
import asyncio, sys
from luthier.engine.requests import Sampling
from luthier.serve.backend import Ask
from luthier.serve.process import ProcessBackend
from luthier.serve.settings import EngineSettings

async def main():
    backend = ProcessBackend(EngineSettings(model=sys.argv[1], dtype="float32"), threads=1)
    await backend.start()
    stream = backend.stream(Ask("r", (5, 6, 7), None, Sampling(max_new_tokens=240, ignore_eos=True), "t"))
    await anext(stream)
    print(backend.pid, "torch" in sys.modules, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_engine_ends_with_its_gateway(scene: Scene, how: signal.Signals) -> None:
    gateway = subprocess.Popen([sys.executable, "-c", GATEWAY, str(scene.model)], stdout=subprocess.PIPE, text=True)
    assert gateway.stdout is not None
    engine, has_torch = gateway.stdout.readline().split()
    assert has_torch == "False"
    assert not is_gone(int(engine))
    gateway.send_signal(how)
    assert gateway.wait(20) == -how
    gateway.stdout.close()
    wait_until(lambda: is_gone(int(engine)))


def test_nobody_else_can_connect(backend: ProcessBackend) -> None:
    assert backend.pid is not None
    engine = psutil.Process(backend.pid)
    assert not [each for each in engine.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    assert not [each for each in engine.net_connections("unix") if each.laddr]
    assert not [each for each in psutil.Process().net_connections("unix") if each.laddr and "luthier" in str(each.laddr)]
    assert not any("lk_" in word for word in engine.cmdline())


def test_stop_signals_are_the_gateways_business(scene: Scene, backend: ProcessBackend) -> None:
    assert backend.pid is not None
    for each in (signal.SIGINT, signal.SIGTERM):
        os.kill(backend.pid, each)
    time.sleep(0.2)
    [prompt] = prompts_of([4], seed=9)
    assert scene.run(events_of(backend, scene.ask(prompt, None)))[-1].completion.token_ids == scene.wanted(prompt, None)
