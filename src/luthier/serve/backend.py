"""What a gateway needs of an engine, whichever it is: tokens in, events out, adapters by reference.

    EngineBackend     the embedded engine in this process
    ProcessBackend    the embedded engine in a process of its own, started again when it dies (process.py)
    VllmBackend       vLLM behind a socket that only the gateway can reach (vllm/)

Prompts are rendered and read back in the gateway, in one place for all of them. A reference (orders:3) names one immutable
version; the backend loads it when it is first asked for.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core.errors import AdapterStateError
from luthier.engine.jobs import Event, Handle
from luthier.engine.requests import Sampling

if TYPE_CHECKING:
    from luthier.engine.serving import Engine


@dataclass(frozen=True)
class Ask:
    """One answer that is wanted: token ids of the prompt, the adapter's reference (None: the base), how to draw."""

    id: str
    prompt_ids: tuple[int, ...]
    adapter: str | None
    sampling: Sampling
    tenant: str


class Backend(Protocol):
    """An engine as a gateway sees it. Its methods raise what the engine raises, and EngineError while it is away."""

    async def start(self) -> None:
        """Be ready to answer, or raise."""

    async def close(self) -> None:
        """Stop; what still runs ends as cancelled."""

    async def state(self) -> str | None:
        """Return None when it answers, else why not, in words."""

    async def room(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        ...

    def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the answer as it is made; the last event holds the completion. Closing the iterator cancels the request."""
        ...

    async def embed(self, rows: list[tuple[int, ...]], adapter: str | None) -> list[list[float]]:
        """Return one vector for each row of token ids. Raises: ConfigError where the model has no embeddings."""
        ...

    async def load(self, reference: str) -> None:
        """Read an adapter now, not with its first request. Raises: AdapterFormatError, BaseMismatchError, ..."""

    async def unload(self, reference: str) -> None:
        """Let an adapter go once its requests are done; returns when its memory has been given back."""

    async def stats(self) -> Mapping[str, Any]:
        """Return the figures of `Engine.stats` as plain data (what is a dataclass there is a dictionary here)."""
        ...


class EngineBackend:
    """The embedded engine in this process. `sources` are folders by name; other references are looked up in its registry."""

    def __init__(self, engine: "Engine", sources: Mapping[str, Any] | None = None):
        self.engine = engine
        self._sources = dict(sources or {})

    async def start(self) -> None:
        """Nothing to wait for: an engine that was made answers."""

    async def close(self) -> None:
        """Close the engine."""
        await asyncio.to_thread(self.engine.close)

    async def state(self) -> str | None:
        """Return why it does not answer."""
        return self.engine.closed_because

    async def room(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        limits = self.engine.limits
        return min(limits.kv_tokens, limits.max_request_tokens or limits.kv_tokens)

    def submit(self, ask: Ask, on_event: Callable[[Event], None]) -> Handle:
        """Take a request without asyncio: `on_event` is called in the engine's thread. Raises: what `Engine.submit` raises."""
        if ask.adapter is not None:
            self._know(ask.adapter)
        return self.engine.submit(
            ask.prompt_ids, adapter=ask.adapter, sampling=ask.sampling, tenant=ask.tenant, on_event=on_event
        )

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the answer as it is made."""
        if ask.adapter is not None:
            self._know(ask.adapter)
        events = self.engine.astream(ask.prompt_ids, adapter=ask.adapter, sampling=ask.sampling, tenant=ask.tenant)
        async with aclosing(events):
            async for event in events:
                yield event

    async def embed(self, rows: list[tuple[int, ...]], adapter: str | None) -> list[list[float]]:
        """Return one vector for each row of token ids."""
        if adapter is not None:
            self._know(adapter)
        return await asyncio.to_thread(self.engine.embed, rows, adapter=adapter)

    async def load(self, reference: str) -> None:
        """Read an adapter now."""
        self._know(reference)
        await asyncio.to_thread(self.engine.check_adapter, reference)

    async def unload(self, reference: str) -> None:
        """Let an adapter go once its requests are done."""
        try:
            done = self.engine.unload_adapter(reference)
        except AdapterStateError:
            return  # it was never asked for
        await asyncio.wrap_future(done)

    async def stats(self) -> Mapping[str, Any]:
        """Return the engine's figures."""
        figures = self.engine.stats()
        return {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in figures.items()
        }

    def _know(self, reference: str) -> None:
        if not self.engine.knows(reference):
            self.engine.add_adapter(reference, self._sources.get(reference, reference))
