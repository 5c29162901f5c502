"""Views of a registry that changes, goes away and comes back. The clock is the test's; the looks are the test's too."""

import asyncio

import pytest
from sqlalchemy.exc import OperationalError
from tests.gateway_scene import until, view

from luthier.registry.view import ServingView
from luthier.serve.errors import ApiError
from luthier.serve.views import WatchedViews


class Source:
    """A registry that has a view, or is away."""

    def __init__(self) -> None:
        self.view: ServingView | None = view(1)
        self.num_reads = 0

    def look(self, known: int | None) -> ServingView | None:
        """Return the view unless it is known."""
        if self.view is None:
            raise OperationalError("SELECT", {}, Exception("the server closed the connection"))
        if self.view.revision == known:
            return None
        self.num_reads += 1
        return self.view


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def watched(source: Source, clock: Clock, refresh_seconds: float = 0.01) -> WatchedViews:
    return WatchedViews(source.look, refresh_seconds=refresh_seconds, stale_seconds=300, clock=clock)


def test_a_change_is_taken_and_what_did_not_change_is_not_read_again() -> None:
    async def scenario() -> None:
        source, taken = Source(), list[int]()
        views = watched(source, Clock())
        await views.start(lambda new: taken.append(new.revision))
        assert taken == [1]
        source.view = view(2)
        await until(lambda: taken == [1, 2])
        assert views.current().revision == 2 and source.num_reads == 2
        await views.close()

    asyncio.run(scenario())


def test_an_older_revision_is_a_change_too() -> None:
    """A registry that was restored from a backup."""

    async def scenario() -> None:
        source = Source()
        views = watched(source, Clock())
        source.view = view(9)
        await views.start(lambda _: None)
        source.view = view(4)
        await until(lambda: views.current().revision == 4)
        await views.close()

    asyncio.run(scenario())


def test_while_the_registry_is_away_the_last_view_counts_for_so_long_and_no_longer() -> None:
    async def scenario() -> None:
        source, clock = Source(), Clock()
        views = watched(source, clock)
        await views.start(lambda _: None)
        source.view = None
        await until(lambda: views.away_because is not None)
        clock.seconds = 299
        assert views.current().revision == 1 and views.fault() is None
        clock.seconds = 301
        with pytest.raises(ApiError) as caught:
            views.current()
        assert caught.value.status == 503 and "Retry-After" in caught.value.headers
        assert "301 seconds" in str(views.fault())
        source.view = view(2)
        await until(lambda: views.fault() is None)
        assert views.current().revision == 2
        await views.close()

    asyncio.run(scenario())


def test_a_server_that_starts_while_the_registry_is_away_says_so_and_recovers() -> None:
    async def scenario() -> None:
        source = Source()
        source.view = None
        views = watched(source, Clock())
        await views.start(lambda _: None)
        with pytest.raises(ApiError):
            views.current()
        assert views.fault() == "the registry has not been read yet"
        source.view = view(1)
        await until(lambda: views.fault() is None)
        await views.close()

    asyncio.run(scenario())


def test_a_look_that_hangs_is_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    async def scenario() -> None:
        source, clock, hang = Source(), Clock(), threading.Event()
        views = watched(source, clock)
        await views.start(lambda _: None)
        begun = threading.Event()

        def hanging(known: int | None) -> ServingView | None:
            begun.set()
            hang.wait(20)
            return None

        views._look = hanging
        await asyncio.to_thread(begun.wait, 20)
        clock.seconds = 301
        with pytest.raises(ApiError):
            views.current()
        assert views.fault() is not None
        hang.set()
        await views.close()

    asyncio.run(scenario())
