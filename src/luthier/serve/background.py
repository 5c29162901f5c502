"""Work beside the requests: an act that is repeated until the gateway closes, and a thread for what blocks.

A registry that hangs must hang nobody but those who wait for it, so each kind of work has a thread of its own.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError

log = logging.getLogger(__name__)
Given = ParamSpec("Given")
Result = TypeVar("Result")


class Worker:
    """One thread for calls that block; they wait for each other, and never the event loop for them."""

    def __init__(self, name: str):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"luthier-{name}")

    async def do(self, act: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
        """Return what `act` returns, from the thread. Who is cancelled no longer waits; what has begun goes on."""
        return await asyncio.wrap_future(self._thread.submit(act, *args, **kwargs))

    def close(self) -> None:
        """Take nothing more; what has not begun is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Repeating:
    """Calls `act` every `seconds`, at once after `soon`, until it is closed. What it raises is logged, and it goes on."""

    def __init__(self, name: str, seconds: float, act: Callable[[], Awaitable[None]]):
        self._name, self._seconds, self._act = name, seconds, act
        self._now = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, with the first call at once."""
        self._task = asyncio.create_task(self._run(), name=f"luthier {self._name}")

    def soon(self) -> None:
        """Do not wait for the next turn."""
        self._now.set()

    async def close(self) -> None:
        """End it, also in the middle of a call."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                await self._act()
            except Exception:
                log.exception("%s failed; it is tried again", self._name)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):  # not wait_for, which loses a cancellation now and then (Python 3.11)
                    await self._now.wait()
            self._now.clear()


def is_away(error: BaseException) -> bool:
    """Whether an error says that the registry cannot be reached now, not that what was asked of it is wrong."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated or isinstance(error, OperationalError) or error.statement is None
    return isinstance(error, OSError) or (isinstance(error, SQLAlchemyError) and "QueuePool" in str(error))
