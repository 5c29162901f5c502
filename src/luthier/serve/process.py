"""ProcessBackend: the embedded engine in a process of its own.

A crash of the engine, or the kernel's answer to its hunger for memory, takes its running requests and nothing else: keys, usage
and connections are here. And the gateway's Python does not take turns with the thread that computes. Their socket is a pair
that was made before the process, so it has no name and nobody else can connect to it.

    starting -> up -> away -> up ...      it died, and is started again after a pause that grows with each vain try
    starting -> failed                    the first start is not tried twice: who called `start` is told why
    close                                 what still runs ends as cancelled

A request belongs to one life of the engine and ends with it.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import replace
from typing import Any, Self

from luthier.core.errors import EngineError, LuthierError
from luthier.core.threads import spin_briefly
from luthier.engine.jobs import Event
from luthier.serve.backend import Ask
from luthier.serve.settings import EngineSettings
from luthier.serve.wire import Answer, Message, Part, ask_message, error_of, frame, read_message

log = logging.getLogger(__name__)

STEADY_SECONDS = 60.0
"""An engine that lived so long is started again as if it were the first time that it died."""

CLOSE_SECONDS = 10.0
"""An engine that was asked to end and has not by then is killed."""

KERNELS_KEPT = 32
"""Products of one shape that oneDNN keeps the generated code of; 1,024 by default, each some 50 KiB of memory.

An engine's steps have any number of rows, so by default it grows for an hour, until it has kept that many. Measured from minute 2
to 10 of `benchmarks/serve_soak.py`: +3.9 % of resident memory by default, +0.5 % with 32, and no slower.
"""


class ProcessBackend:
    """An engine in a child process, by `EngineSettings`; a `Backend`.

    `progress` is told what happens while it is loaded. `threads` is how many it computes with (None: as many as torch takes).
    After a death it is started again after `pause_seconds`, twice that after the next, and so on up to `longest_pause_seconds`.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        progress: Callable[[str], None] | None = None,
        threads: int | None = None,
        pause_seconds: float = 0.5,
        longest_pause_seconds: float = 30.0,
    ):
        self.settings = settings
        self.facts: Mapping[str, Any] = {}
        self.restarts = 0
        self._progress = progress
        self._environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
        spin_briefly(self._environment)
        self._environment.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
        self._pauses = (pause_seconds, longest_pause_seconds)
        self._life: _Life | None = None
        self._away: str | None = "the engine has not been started"
        self._supervising: asyncio.Task[None] | None = None
        self._pinned: dict[str, None] = {}
        self._reloading: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The number of the engine's process; None while there is none."""
        return None if self._life is None or self._away is not None else self._life.process.pid

    async def start(self) -> None:
        """Load the base. Raises: what loading it raises, as if it were loaded here; EngineError if the process dies over it."""
        if self._supervising is not None:
            return
        self._away = "the engine is being started"
        self._life = await self._begin()
        self._away = None
        self._supervising = asyncio.create_task(self._supervise(self._life))

    async def close(self) -> None:
        """End the process; what still runs ends as cancelled."""
        self._away = "the engine has been closed"
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait({self._supervising})
        if self._life is not None:
            await self._life.close()

    async def state(self) -> str | None:
        """Return why it does not answer."""
        return self._away

    async def room(self) -> int:
        """Return how many tokens a prompt and its answer may have together."""
        return min(self.facts["kv_tokens"], self.facts["max_request_tokens"] or self.facts["kv_tokens"])

    async def stream(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the answer as it is made."""
        life, answer = self._living(), Answer()
        id, parts = life.ask(ask)
        is_done = False
        try:
            while not is_done:
                part = await parts.get()
                is_done = part is None or part[-1] is not None
                if part is None:
                    raise EngineError(life.loss)
                yield answer.event(part)
        finally:
            life.forget(id, cancel=not is_done)

    async def embed(self, rows: list[tuple[int, ...]], adapter: str | None) -> list[list[float]]:
        """Return one vector for each row of token ids."""
        vectors: list[list[float]] = await self._living().call("embed", rows, adapter)
        return vectors

    async def load(self, reference: str) -> None:
        """Read an adapter now, and again whenever the engine was started again."""
        await self._living().call("load", reference)
        self._pinned[reference] = None

    async def unload(self, reference: str) -> None:
        """Let an adapter go once its requests are done."""
        self._pinned.pop(reference, None)
        await self._living().call("unload", reference)

    async def stats(self) -> Mapping[str, Any]:
        """Return the engine's figures, and how often it was started again."""
        figures: dict[str, Any] = await self._living().call("stats")
        return figures | {"restarts": self.restarts}

    def _living(self) -> "_Life":
        if self._away is not None or self._life is None:
            raise EngineError(f"{self._away}; ask again in a moment")
        return self._life

    async def _begin(self) -> "_Life":
        life = await _Life.begin(self.settings, self._environment, self._progress)
        self.facts = life.facts
        return life

    async def _supervise(self, life: "_Life") -> None:
        """Start the engine again each time it dies, until this task is cancelled."""
        vain = 0
        shortest, longest = self._pauses
        while True:
            await life.wait()
            why = life.ended_because
            vain = 0 if life.seconds > STEADY_SECONDS else vain
            while True:
                pause = min(longest, shortest * 2 ** min(vain, 20))
                self._away = f"{why} and is being started again"
                log.error("%s; it is started again in %.1f s", why, pause)
                await asyncio.sleep(pause)
                vain += 1
                try:
                    life = self._life = await self._begin()
                    break
                except (LuthierError, OSError) as error:
                    why = f"the engine could not be started ({error})"
            self.restarts += 1
            self._away = None
            self._reloading = asyncio.create_task(self._load_again(life))

    async def _load_again(self, life: "_Life") -> None:
        for reference in list(self._pinned):
            try:
                await life.call("load", reference)
            except LuthierError as error:
                log.warning("adapter %s was not loaded again: %s", reference, error)


class _Life:
    """One process of the engine, from its start to its end, and the requests that it has."""

    def __init__(self, process: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.process, self._reader, self._writer = process, reader, writer
        self.facts: Mapping[str, Any] = {}
        self.ended_because = ""
        self._began = time.monotonic()
        self._is_closing = False
        self._numbers = itertools.count()
        self._parts: dict[str, asyncio.Queue[Part | None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls, settings: EngineSettings, environment: Mapping[str, str], progress: Callable[[str], None] | None
    ) -> Self:
        """Start a process and return once it is ready. Raises: what loading raised there, EngineError if it died."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # -P: a file in the working directory is no module of ours.
                words = ("-P", "-m", "luthier.serve.worker", str(theirs.fileno()), str(os.getpid()))
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *words,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,  # whatever a library prints belongs beside the log
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
        except BaseException:
            ours.close()
            raise
        life = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            await life._load(settings, progress)
        except BaseException:
            life._writer.close()
            await life._kill()
            raise
        life._reading = asyncio.create_task(life._read())
        return life

    @property
    def seconds(self) -> float:
        """How long ago it was started."""
        return time.monotonic() - self._began

    async def _load(self, settings: EngineSettings, progress: Callable[[str], None] | None) -> None:
        self._send(settings.model_dump(mode="json"))
        while (message := await read_message(self._reader)) is not None:
            if message["kind"] == "ready":
                self.facts = message["facts"]
                return
            if message["kind"] == "failed":
                raise error_of(message["error"])
            if progress is not None:
                progress(message["text"])
        raise EngineError(f"{await self._how_it_ended()} while it loaded {settings.model}")

    async def _read(self) -> None:
        """Hand out what comes until nothing more does; then tell everybody who waits."""
        while (message := await read_message(self._reader)) is not None:
            if message["kind"] == "parts":
                for part in message["parts"]:
                    if (parts := self._parts.get(part[0])) is not None:
                        parts.put_nowait(part)
            elif (waiting := self._calls.pop(message["number"], None)) is not None and not waiting.done():
                if "error" in message:
                    waiting.set_exception(error_of(message["error"]))
                else:
                    waiting.set_result(message["value"])
        self.ended_because = await self._how_it_ended()
        for parts in self._parts.values():
            parts.put_nowait(None)
        for waiting in self._calls.values():
            if not waiting.done():
                waiting.set_exception(EngineError(self.loss))
        self._writer.close()

    @property
    def loss(self) -> str:
        """What somebody is told whose request ended with the process."""
        return self.ended_because if self._is_closing else f"{self.ended_because} and is being started again; ask once more"

    async def _how_it_ended(self) -> str:
        try:
            status = await asyncio.wait_for(self.process.wait(), CLOSE_SECONDS)
        except TimeoutError:  # it closed the socket and lives: of no use to anybody
            status = await self._kill()
        if status >= 0:
            return "the engine has been closed" if self._is_closing else f"the engine ended with status {status}"
        with contextlib.suppress(ValueError):
            return f"the engine died ({signal.Signals(-status).name})"
        return f"the engine died (signal {-status})"

    def ask(self, ask: Ask) -> "tuple[str, asyncio.Queue[Part | None]]":
        """Send a request; return its id here and the queue in which its parts come, and None when the engine has died.

        The id is ours: one that a client chose may be used twice at a time, by another tenant too.
        """
        id = f"r{next(self._numbers)}"
        parts: asyncio.Queue[Part | None] = asyncio.Queue()
        self._parts[id] = parts
        self._send(ask_message(replace(ask, id=id)))
        if self.ended_because:
            parts.put_nowait(None)
        return id, parts

    def forget(self, id: str, *, cancel: bool) -> None:
        """Take no more parts of a request, and have it stopped if it still runs."""
        self._parts.pop(id, None)
        if cancel:
            self._send({"kind": "cancel", "id": id})

    async def call(self, name: str, *arguments: Any) -> Any:
        """Call a method of the backend over there. Raises: what it raised, EngineError if the engine dies meanwhile."""
        if self.ended_because:
            raise EngineError(self.loss)
        number = next(self._numbers)
        waiting = self._calls[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"kind": "call", "number": number, "name": name, "arguments": list(arguments)})
            return await waiting
        finally:
            self._calls.pop(number, None)

    async def wait(self) -> None:
        """Return when the process has ended, and everybody has been told."""
        assert self._reading is not None
        await asyncio.wait({self._reading})

    async def close(self) -> None:
        """Have the process end by itself, or kill it if it does not."""
        self._is_closing = True
        self._send({"kind": "close"})
        assert self._reading is not None
        done, _ = await asyncio.wait({self._reading}, timeout=CLOSE_SECONDS)
        if not done:
            await self._kill()
            await self.wait()

    async def _kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        return await self.process.wait()

    def _send(self, message: Message) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(message))
