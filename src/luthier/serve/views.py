"""Where a gateway's view of the registry comes from: fixed when it starts, or read anew whenever the registry changes."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from luthier.core.errors import LuthierError
from luthier.registry.tenancy import Scope, digest_of_key
from luthier.registry.view import BaseTarget, Caller, ServingView, Target, VersionTarget
from luthier.serve.background import Repeating, Worker
from luthier.serve.errors import unavailable

LOCAL = "local"
FIRST_LOOK_SECONDS = 10.0
log = logging.getLogger(__name__)

Look = Callable[[int | None], ServingView | None]
"""Return the view of the registry, or None where the revision that is given is still the newest. It may block."""


class Views(Protocol):
    """Gives the view that counts now."""

    def current(self) -> ServingView:
        """Return the newest view. Raises: ApiError 503 when it is too old to be trusted."""
        ...

    def fault(self) -> str | None:
        """Return why there is no view to be trusted, in words that tell nothing of tenants; None where there is one."""
        ...

    def age(self) -> float | None:
        """Return how many seconds ago the registry was last read; None where there is none, or it never was."""
        ...

    async def start(self, taken: Callable[[ServingView], None]) -> None:
        """Begin to look; `taken` is told each new view."""

    def soon(self) -> None:
        """Look now: something is known to have changed."""

    async def close(self) -> None:
        """Look no more."""


class FixedViews:
    """One view for good: a gateway without a registry."""

    def __init__(self, view: ServingView):
        self._view = view

    def current(self) -> ServingView:
        """Return the view."""
        return self._view

    def fault(self) -> str | None:
        """Return None: it does not age."""
        return None

    def age(self) -> float | None:
        """Return None."""
        return None

    async def start(self, taken: Callable[[ServingView], None]) -> None:
        """Tell the one view."""
        taken(self._view)

    def soon(self) -> None:
        """Do nothing: it never changes."""

    async def close(self) -> None:
        """Do nothing."""


class WatchedViews:
    """The view of a registry that changes: asked for its revision every `refresh_seconds`, read anew when that is another.

    While the registry is away the last view counts for `stale_seconds` after the last look that succeeded, since keys that were
    revoked meanwhile would count for ever otherwise. A look that hangs is no look that succeeded.
    """

    def __init__(self, look: Look, *, refresh_seconds: float, stale_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._look, self._stale_seconds, self._clock = look, stale_seconds, clock
        self._worker = Worker("views")
        self._repeating = Repeating("looking for changes of the registry", refresh_seconds, self.refresh)
        self._view: ServingView | None = None
        self._looked = asyncio.Event()
        self._seen_at = -float("inf")
        self._away_because: str | None = None
        self._taken: Callable[[ServingView], None] = lambda _: None

    def current(self) -> ServingView:
        """Return the view that was read last. Raises: ApiError 503 when the registry has been away for too long."""
        if self._view is None or self._clock() - self._seen_at > self._stale_seconds:
            raise unavailable("The registry of keys and models is out of reach. Try again later.", 5)
        return self._view

    def fault(self) -> str | None:
        """Return why `current` would refuse; while the last view still counts there is no fault."""
        age = self._clock() - self._seen_at
        if self._view is None:
            return "the registry has not been read yet"
        return f"the registry has been out of reach for {age:.0f} seconds" if age > self._stale_seconds else None

    def age(self) -> float | None:
        """Return how many seconds ago the last look began that succeeded."""
        return None if self._view is None else self._clock() - self._seen_at

    @property
    def away_because(self) -> str | None:
        """Why the last look failed, for the log and for operators; None where it did not."""
        return self._away_because

    async def start(self, taken: Callable[[ServingView], None]) -> None:
        """Look once now, so that a registry in reach is known before the first request, and then again and again."""
        self._taken = taken
        self._repeating.start()
        with contextlib.suppress(TimeoutError):  # a registry that hangs must not keep the server from saying so
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                await self._looked.wait()

    async def refresh(self) -> None:
        """Look once, and have a view that is new count."""
        try:
            await self._refresh()
        finally:
            self._looked.set()

    async def _refresh(self) -> None:
        begun = self._clock()
        try:
            view = await self._worker.do(self._look, None if self._view is None else self._view.revision)
        except (SQLAlchemyError, LuthierError, OSError) as error:
            if self._away_because is None:
                log.warning(
                    "the registry is out of reach; what was last read of it counts for %g s: %s", self._stale_seconds, error
                )
            self._away_because = str(error)
            return
        if self._away_because is not None:
            log.warning("the registry is back")
        self._away_because, self._seen_at = None, begun
        if view is not None:
            self._view = view
            self._taken(view)

    def soon(self) -> None:
        """Look now: something is known to have changed."""
        self._repeating.soon()

    async def close(self) -> None:
        """Look no more."""
        await self._repeating.close()
        self._worker.close()


def local_view(key: str, base: str, adapters: Iterable[str]) -> ServingView:
    """Return the view of a gateway without a registry: one tenant, one key that may do everything, folders by name."""
    caller = Caller(0, LOCAL, 0, LOCAL, frozenset({Scope.INFERENCE, Scope.ADMIN}))
    moment = datetime.now(UTC)
    named = {name: VersionTarget(name, created_at=moment) for name in adapters}
    names: dict[str, Target] = {base: BaseTarget(base, moment), **named}
    return ServingView(0, {digest_of_key(key): caller}, {0: names}, {0: tuple(names)})
