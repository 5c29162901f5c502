"""VllmBackend: a gateway's engine that is vLLM in another process, behind a socket that nobody else can open.

A version is loaded when it is first asked for: vLLM resolves it through the plugin, which says why where it is refused. After
vLLM was started again nothing is loaded, and everything is loaded anew the same way.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx

from luthier.core import errors
from luthier.core.errors import AdapterError, ConfigError, EngineError, LuthierError, RequestError
from luthier.engine.jobs import Event
from luthier.engine.requests import Sampling
from luthier.serve.backend import Ask
from luthier.serve.vllm.asking import Answer, body_of
from luthier.serve.vllm.checking import size_for
from luthier.serve.vllm.command import RAW_BASE, ZERO
from luthier.serve.vllm.figures import Figures, read_gauges
from luthier.serve.vllm.settings import VllmSettings
from luthier.serve.vllm.supervisor import Supervisor

USUAL_RANK = 16
"""Room for versions that are registered while vLLM runs, where the registry has none of a larger rank."""

RAISED = {
    kind.__name__: kind
    for kind in (
        errors.AdapterError,
        errors.AdapterFormatError,
        errors.BaseMismatchError,
        errors.BlobError,
        errors.ModelError,
        errors.RefusedError,
        errors.RegistryError,
        errors.StorageError,
        errors.UnservableError,
    )
}
"""What the plugin may say by the name of its class."""


def vllm_backend(model: Path, tokenizer: Any, settings: VllmSettings, *, registry: str | None = None) -> "VllmBackend":
    """Return a backend over the base in the folder `model`; nothing is started yet. `registry` is a place, None the default one.

    Raises: ConfigError, RegistryError where the registry cannot be opened.
    """
    from luthier.registry.place import default_place, open_registry

    place = registry or default_place()
    max_rank = settings.max_lora_rank or size_for(iter([USUAL_RANK, *_ranks_in(open_registry(place))]))
    return VllmBackend(Supervisor(model, settings, max_rank=max_rank, registry=place), tokenizer, eos_ids(model, tokenizer))


def eos_ids(model: Path, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer of the model in this folder, as the embedded engine takes them."""
    found: Any = None
    for name in ("generation_config.json", "config.json"):
        if found is None and (model / name).is_file():
            found = json.loads((model / name).read_bytes()).get("eos_token_id")
    ids = [found] if isinstance(found, int) else list(found or [])
    own = tokenizer.eos_token_id
    return frozenset(map(int, ids if own is None else [*ids, own]))


class VllmBackend:
    """The backend over a supervised vLLM. `stop_ids` are the model's own stop tokens."""

    def __init__(self, supervisor: Supervisor, tokenizer: Any, stop_ids: Collection[int]):
        self.supervisor = supervisor
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._generation = 0
        self._uses: Counter[str] = Counter()
        self._freed = asyncio.Condition()
        self._figures = Figures()
        self._room: int | None = None

    async def start(self) -> None:
        """Start vLLM; returns when it answers. Raises: ConfigError, ModelError, EngineError with the end of its output."""
        await self.supervisor.start()

    async def close(self) -> None:
        """End vLLM."""
        await self.supervisor.close()

    async def state(self) -> str | None:
        """Return why vLLM does not answer; the end of its output is for the log."""
        why = self.supervisor.state
        return None if why is None else why.splitlines()[0]

    async def room(self) -> int:
        """Return how many tokens a prompt and its answer may have together: vLLM's --max-model-len. Raises: EngineError."""
        if self._room is None:
            self._check_state()
            try:
                models = (await self.supervisor.client.get("/v1/models")).json()["data"]
            except httpx.HTTPError as error:
                raise self._away(error) from error
            self._room = int(models[0]["max_model_len"])
        return self._room

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the answer as it is made. Closing the iterator closes the connection, which ends the request in vLLM."""
        name, number = ask.adapter, self._figures.begin()
        if name is not None:
            self._uses[name] += 1
        try:
            async with aclosing(self._stream(ask)) as events:
                async for event in events:
                    self._figures.first(number)
                    if event.completion is not None:
                        self._figures.ended(event.completion)
                    yield event
        finally:
            self._figures.first(number)
            if name is not None:
                self._uses[name] -= 1
                async with self._freed:
                    self._freed.notify_all()

    async def embed(self, rows: list[tuple[int, ...]], adapter: str | None) -> list[list[float]]:
        """Refuse: a vLLM that generates makes no embeddings."""
        raise ConfigError("this gateway's vLLM generates text and makes no embeddings; the embedded engine does")

    async def load(self, reference: str) -> None:
        """Have vLLM read an adapter now. Raises: what the plugin refused it with, EngineError while vLLM is away."""
        self._check_state()
        if self._generation != self.supervisor.generation:
            self._generation = self.supervisor.generation
            self._loads.clear()
        task = self._loads.get(reference)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._loads[reference] = asyncio.create_task(self._load(reference))
        await asyncio.shield(task)  # others may wait for the same

    async def unload(self, reference: str) -> None:
        """Let an adapter go once its requests are done; vLLM gives its memory back."""
        async with self._freed:
            await self._freed.wait_for(lambda: self._uses[reference] <= 0)
        del self._uses[reference]
        if self._loads.pop(reference, None) is not None and self.supervisor.state is None:
            await self._post("/v1/unload_lora_adapter", {"lora_name": reference})

    async def stats(self) -> Mapping[str, Any]:
        """Return the figures of `Engine.stats` as far as vLLM tells them. Raises: EngineError while it is away."""
        self._check_state()
        try:
            gauges = read_gauges((await self.supervisor.client.get("/metrics", timeout=5.0)).text)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        told = self._figures.told({name: _state(task) for name, task in self._loads.items()}, gauges)
        return told | {"restarts": self.supervisor.restarts, "slow_because": None}

    # --- talking to vLLM -----------------------------------------------------------------------------------------

    async def _stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        self._check_state()
        stop_ids = self._ends(ask.sampling)
        answer = Answer(self._tokenizer, ask.prompt_ids, ask.sampling, stop_ids)
        model = ask.adapter or (ZERO if self.supervisor.is_cpu else RAW_BASE)
        body = body_of(model, ask.prompt_ids, ask.sampling, stop_ids, self._salt(ask.tenant))
        for is_last in (False, True):
            if ask.adapter is not None:
                await self.load(ask.adapter)
            try:
                async with self.supervisor.client.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code == httpx.codes.NOT_FOUND and not is_last and ask.adapter is not None:
                        self._loads.pop(ask.adapter, None)  # vLLM was started again a moment ago
                        continue
                    if response.status_code != httpx.codes.OK:
                        raise _refusal(response.status_code, await response.aread())
                    async with aclosing(answer.events(response.aiter_lines())) as events:
                        async for event in events:
                            yield event
                    return
            except httpx.HTTPError as error:
                raise self._away(error) from error

    async def _load(self, reference: str) -> None:
        began = time.monotonic()
        num_bytes = None
        try:
            status, told = await self._post("/v1/load_lora_adapter", {"lora_name": reference})
            if status != httpx.codes.OK:
                raise _refusal(status, told)
            num_bytes = int(json.loads(told)["bytes"])
        finally:
            self._figures.loaded(reference, time.monotonic() - began, num_bytes)

    async def _post(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        try:
            response = await self.supervisor.client.post(path, json=body)
        except httpx.HTTPError as error:
            raise self._away(error) from error
        return response.status_code, response.content

    def _check_state(self) -> None:
        if (why := self.supervisor.state) is not None:
            raise EngineError(why.splitlines()[0])

    def _away(self, error: httpx.HTTPError) -> EngineError:
        why = (self.supervisor.state or "the connection to vLLM broke").splitlines()[0]
        return EngineError(f"{why} ({type(error).__name__})")

    def _ends(self, sampling: Sampling) -> frozenset[int]:
        """All tokens that end an answer. One of a given form can only end with one of the model's own."""
        own = frozenset() if sampling.ignore_eos and sampling.constraint is None else self._stop_ids
        return own | frozenset(sampling.stop_token_ids)

    def _salt(self, tenant: str) -> str:
        """What parts tenants in vLLM's prefix cache: none can tell by the time it takes what another has asked."""
        return sha256(f"{self.supervisor.key} {tenant}".encode()).hexdigest()


def _ranks_in(registry: Any) -> list[int]:
    """The ranks of the versions that may be used."""
    from sqlalchemy import select

    from luthier.registry.columns import Lifecycle
    from luthier.registry.schema import AdapterVersion

    gone = (Lifecycle.ERASED, Lifecycle.RETIRED)
    with registry.database.reading() as session:
        return list(session.scalars(select(AdapterVersion.rank).where(AdapterVersion.lifecycle.not_in(gone)).distinct()))


def _refusal(status: int, told: bytes) -> LuthierError:
    """What vLLM, or the plugin in it, said instead of an answer."""
    try:
        error = json.loads(told)["error"]
        kind, words = str(error.get("type")), str(error.get("message"))
    except (ValueError, KeyError, AttributeError, TypeError):
        kind, words = "", told.decode(errors="replace")[:300]
    if status == httpx.codes.CONFLICT:
        return RAISED.get(kind, AdapterError)(words)
    if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
        return RequestError(words)
    return EngineError(f"vLLM answered {status}: {words}")


def _state(task: "asyncio.Task[None]") -> str:
    if not task.done():
        return "loading"
    return "failed" if task.cancelled() or task.exception() is not None else "resident"
