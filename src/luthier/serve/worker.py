"""The engine's process: `python -m luthier.serve.worker FD PARENT` serves the one gateway at the other end of that socket.

It ends with it: the kernel kills it when its parent dies (Linux), and elsewhere the closed socket tells it. Stop signals are the
gateway's business, which has running answers to finish; a terminal or a service manager sends them to both.

One thread runs this file's event loop; the engine has its own, which only leaves its events in a list here. The loop is woken
once and sends all that is there by then, which is mostly one step's.
"""

import asyncio
import contextlib
import ctypes
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from luthier.engine.jobs import Event, Handle
from luthier.serve.backend import Ask, EngineBackend
from luthier.serve.embedded import load_backend
from luthier.serve.logs import log_to
from luthier.serve.settings import EngineSettings
from luthier.serve.wire import Message, Part, error_fields, frame, part_of, read_ask, read_message

CALLS = frozenset({"embed", "load", "stats", "unload"})
FAULT = 70
"""Exit status after a fault of the engine's own thread (EX_SOFTWARE of sysexits.h)."""

PR_SET_PDEATHSIG = 1


class Worker:
    """Carries one gateway's requests to an engine, and its events back. `broken` is set once the engine answers no more."""

    def __init__(self, backend: EngineBackend, writer: asyncio.StreamWriter):
        self.backend, self._writer = backend, writer
        self.broken = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._asked: dict[str, Future[Handle]] = {}
        self._events: deque[tuple[str, Event]] = deque()
        self._is_woken = False
        self._tasks: set[asyncio.Task[None]] = set()

    def take(self, message: Message) -> None:
        """Do what a message asks for. Nothing here waits."""
        kind = message["kind"]
        if kind == "ask":
            ask = read_ask(message)
            asked: Future[Handle] = Future()
            self._asked[ask.id] = asked
            if ask.sampling.constraint is None:
                self._submit(ask, asked)
            else:  # its grammar is read first, which takes a second the first time
                self._start(asyncio.to_thread(self._submit, ask, asked))
        elif kind == "cancel":
            if (found := self._asked.get(message["id"])) is not None:
                found.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
        elif kind == "call":
            self._start(self._call(message["number"], message["name"], message["arguments"]))

    def send(self, message: Message) -> None:
        """Send a message; what the gateway has not read yet is kept."""
        self._writer.write(frame(message))

    def _submit(self, ask: Ask, asked: "Future[Handle]") -> None:
        try:
            asked.set_result(self.backend.submit(ask, partial(self._came, ask.id)))
        except Exception as error:  # whatever it is, the gateway waits for the answer
            asked.set_exception(error)
            self._came(ask.id, Event("", ()))

    def _came(self, id: str, event: Event) -> None:
        """Called in the engine's thread, so it does next to nothing."""
        self._events.append((id, event))
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._send_events)

    def _send_events(self) -> None:
        self._is_woken = False  # before the list is emptied: what is put there from now on wakes the loop again
        parts = []
        while self._events:
            parts.append(self._part(*self._events.popleft()))
        if parts:
            self.send({"kind": "parts", "parts": parts})
        if any(part[-1] and "error" in part[-1] for part in parts) and self.backend.engine.closed_because is not None:
            self.broken.set()

    def _part(self, id: str, event: Event) -> Part:
        asked = self._asked[id]
        error = asked.exception()  # a first event may be here an instant before the thread that submits has the handle
        if error is None and event.completion is not None and event.completion.finish_reason == "error":
            try:
                asked.result().result(0)
            except Exception as found:
                error = found
        if error is not None or event.completion is not None:
            del self._asked[id]
        return part_of(id, event, error)

    async def _call(self, number: int, name: str, arguments: list[Any]) -> None:
        assert name in CALLS, name
        try:
            told = {"value": await getattr(self.backend, name)(*arguments)}
        except Exception as error:
            told = {"error": error_fields(error)}
        self.send({"kind": "reply", "number": number, **told})

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def serve(sock: socket.socket) -> int:
    """Load an engine by the settings that come first, serve until the gateway says so or is gone, and return an exit status."""
    reader, writer = await asyncio.open_connection(sock=sock)
    loop = asyncio.get_running_loop()

    def tell(sentence: str) -> None:
        loop.call_soon_threadsafe(writer.write, frame({"kind": "progress", "text": sentence}))

    settings = await read_message(reader)
    if settings is None:
        return 0
    loading = asyncio.ensure_future(asyncio.to_thread(load_backend, EngineSettings(**settings), tell))
    first = asyncio.ensure_future(read_message(reader))
    await asyncio.wait({loading, first}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        os._exit(0)  # nobody waits for it any more, and a load cannot be called back
    try:
        backend, facts = loading.result()
    except Exception as error:
        logging.getLogger(__name__).debug("the engine was not loaded", exc_info=True)
        writer.write(frame({"kind": "failed", "error": error_fields(error)}))
        await _sent(writer)
        return 1
    worker = Worker(backend, writer)
    worker.send({"kind": "ready", "facts": dataclasses.asdict(facts)})
    return await _until_the_end(worker, reader, writer, first)


async def _until_the_end(
    worker: Worker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, first: "asyncio.Future[Message | None]"
) -> int:
    async def read() -> bool:
        message = await first
        while message is not None and message["kind"] != "close":
            worker.take(message)
            message = await read_message(reader)
        return message is not None

    reading = asyncio.ensure_future(read())
    broken = asyncio.ensure_future(worker.broken.wait())
    await asyncio.wait({reading, broken}, return_when=asyncio.FIRST_COMPLETED)
    if not reading.done():
        await _sent(writer)
        os._exit(FAULT)  # what other threads still wait for will not come
    if not reading.result():
        os._exit(0)  # the gateway is gone: there is nobody to finish for
    await worker.backend.close()
    await asyncio.sleep(0)  # the last events, which the engine's thread has left by now, are written
    await _sent(writer)
    return 0


async def _sent(writer: asyncio.StreamWriter) -> None:
    """Close the socket once all that was written is sent."""
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def die_with(parent: int) -> None:
    """Have the kernel end this process when its parent dies, where it can (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it was asked for
            os._exit(0)


def main() -> None:
    """Serve the socket whose number is the first argument, for the process whose number is the second."""
    die_with(int(sys.argv[2]))
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    log_to(sys.stderr)
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)  # or a program started from here would hold it open after our death
    sys.exit(asyncio.run(serve(sock)))


if __name__ == "__main__":
    main()
