"""Answers on their way out: several made at once, sent as server-sent events, and given up when nobody listens any more."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.responses import Response

from luthier.engine.jobs import Event
from luthier.engine.requests import Completion
from luthier.serve.errors import ApiError, server_fault, unavailable

log = logging.getLogger(__name__)

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


class ClientLeftError(Exception):
    """The client has closed its connection: nobody is there to be answered."""


@dataclass(frozen=True)
class Part:
    """An event of answer number `index`."""

    index: int
    event: Event


async def together(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Part, None]:
    """Yield the events of several answers as they come. Where one fails, or the generator is closed, all others are cancelled.

    Raises: what the first one to fail raised; ApiError 503 for an answer that the engine gave up.
    """
    parts: asyncio.Queue[Part | Exception | None] = asyncio.Queue()

    async def pump(index: int, stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    if event.completion is not None and event.completion.finish_reason == "cancelled":
                        raise unavailable("The engine stopped before the answer was complete.")
                    parts.put_nowait(Part(index, event))
        except Exception as error:
            parts.put_nowait(error)
        else:
            parts.put_nowait(None)  # behind the stream's own end, where it may still have had something to record

    tasks = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            part = await parts.get()
            if isinstance(part, Exception):
                raise part
            if part is None:
                left -= 1
            else:
                yield part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def completions(parts: AsyncGenerator[Part, None], number: int) -> list[Completion]:
    """Return the whole answers in their order."""
    found: dict[int, Completion] = {}
    async with aclosing(parts):
        async for part in parts:
            if part.event.completion is not None:
                found[part.index] = part.event.completion
    return [found[index] for index in range(number)]


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives; it is cancelled when the client leaves. The body must have been read.

    Raises: ClientLeftError, and what `work` raises.
    """
    working, leaving = asyncio.create_task(work), asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, the way OpenAI's clients read them: `data: JSON`, at the end `data: [DONE]`.

    A failure in the middle is an event `data: {"error": ...}`, and the end. `source` is what the chunks are made of: it is
    closed whatever happens, even if no chunk was ever asked for.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], source: AsyncGenerator[Any, None], headers: dict[str, str]):
        self.status_code, self.background = 200, None
        self._chunks, self._source = chunks, source
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Send all, unless the client leaves."""
        try:
            await unless_left(receive, self._send(send))
        except (ClientLeftError, OSError):
            log.debug("a client left in the middle of its stream")
        finally:
            await self._source.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self._chunks):
            try:
                async for chunk in self._chunks:
                    await send({"type": "http.response.body", "body": _line(chunk), "more_body": True})
                last = DONE
            except ApiError as error:
                last = _line(error.body())
            except OSError:
                raise
            except Exception:
                log.exception("a stream failed")
                last = _line(server_fault().body())
        await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _line(chunk: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def begun(parts: AsyncGenerator[Part, None], receive: Receive) -> AsyncGenerator[Part, None]:
    """Wait for the first part, so that what fails at once is answered with its own status; return all parts.

    Raises: ClientLeftError, and what the parts raise; then they are closed.
    """

    async def first() -> Part:
        return await anext(parts)

    try:
        return _chained(await unless_left(receive, first()), parts)
    except BaseException:
        await parts.aclose()
        raise


async def _chained(first: Part, rest: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
    yield first
    async for each in rest:
        yield each
