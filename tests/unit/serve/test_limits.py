"""Limits: no minute with more than is allowed, nothing overrun by a burst, and what is told of it. The clock is the test's."""

import copy
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.registry.tenancy import Quotas, Scope
from luthier.registry.view import Caller
from luthier.serve.errors import ApiError
from luthier.serve.limits import Limits, Permit, Window, span, told


class Clock:
    """A clock that stands until it is moved, for spans and for days."""

    def __init__(self) -> None:
        self.seconds, self.start = 1000.0, datetime(2026, 11, 30, 23, 59, 0, tzinfo=UTC)

    def __call__(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return self.start + timedelta(seconds=self.seconds - 1000.0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> Limits:
    return Limits(100, clock=clock, now=clock.now)


def caller(tenant: int = 1, **quotas: int) -> Caller:
    return Caller(tenant, f"tenant-{tenant}", 1, "key", frozenset({Scope.INFERENCE}), Quotas(**quotas))


def refused(enter: Callable[[], Permit]) -> ApiError:
    with pytest.raises(ApiError) as caught:
        enter()
    return caught.value


def test_a_request_too_many_is_told_when_to_come_back(limits: Limits, clock: Clock) -> None:
    one = caller(requests_per_minute=3)
    for _ in range(3):
        limits.enter(one, 10).settle(10)
        clock.seconds += 1
    error = refused(lambda: limits.enter(one, 10))
    assert (error.status, error.code, error.type) == (429, "rate_limit_exceeded", "rate_limit_error")
    wait = int(error.headers["Retry-After"])
    clock.seconds += wait
    limits.enter(one, 10)


def test_waiting_less_than_told_is_in_vain(limits: Limits, clock: Clock) -> None:
    one = caller(requests_per_minute=1)
    limits.enter(one, 1)
    wait = int(refused(lambda: limits.enter(one, 1)).headers["Retry-After"])
    clock.seconds += wait - 2
    assert refused(lambda: limits.enter(one, 1)).status == 429


def test_a_refused_request_uses_nothing(limits: Limits, clock: Clock) -> None:
    one = caller(requests_per_minute=1, tokens_per_minute=100)
    limits.enter(one, 10)
    for _ in range(5):
        refused(lambda: limits.enter(one, 90))
    clock.seconds += 61
    limits.enter(one, 100)


def test_a_burst_cannot_run_over_a_quota_of_tokens(limits: Limits) -> None:
    one = caller(tokens_per_minute=1000)
    permits = [limits.enter(one, 400), limits.enter(one, 400)]
    assert refused(lambda: limits.enter(one, 400)).status == 429
    permits[0].settle(50)  # it answered in few words: what it left may be used
    limits.enter(one, 400)
    assert refused(lambda: limits.enter(one, 400)).status == 429


def test_a_request_is_settled_once(limits: Limits) -> None:
    one = caller(concurrent=1, tokens_per_minute=100)
    permit = limits.enter(one, 60)
    permit.settle(10)
    permit.settle(0)
    assert limits.running == 0
    limits.enter(one, 90)
    assert refused(lambda: limits.enter(one, 1)).status == 429


def test_concurrent_requests_are_counted_until_they_end(limits: Limits) -> None:
    one = caller(concurrent=2)
    permits = [limits.enter(one, 1) for _ in range(2)]
    assert refused(lambda: limits.enter(one, 1)).headers["Retry-After"] == "1"
    permits[0].settle(1)
    limits.enter(one, 1)


def test_one_tenant_does_not_use_what_another_has(limits: Limits) -> None:
    limits.enter(caller(1, requests_per_minute=1, tokens_per_day=10), 10)
    limits.enter(caller(2, requests_per_minute=1, tokens_per_day=10), 10)


def test_the_server_takes_so_many_and_no_more(clock: Clock) -> None:
    limits = Limits(2, clock=clock, now=clock.now)
    permits = [limits.enter(caller(tenant), 1) for tenant in (1, 2)]
    error = refused(lambda: limits.enter(caller(3), 1))
    assert (error.status, error.code) == (429, "queue_full")
    permits[0].settle(1)
    limits.enter(caller(3), 1)


def test_what_never_fits_is_no_matter_of_waiting(limits: Limits) -> None:
    error = refused(lambda: limits.enter(caller(tokens_per_minute=100), 101))
    assert (error.status, error.code) == (400, "tokens_over_quota")
    assert "Retry-After" not in error.headers


def test_the_day_is_the_registrys_sum_and_what_it_has_not_heard_of(limits: Limits, clock: Clock) -> None:
    one, day = caller(tokens_per_day=1000), date(2026, 11, 30)
    limits.sync_day(day, {1: 700}, {1: 100})
    assert refused(lambda: limits.enter(one, 201)).status == 429
    permit = limits.enter(one, 200)
    assert refused(lambda: limits.enter(one, 1)).status == 429
    permit.settle(50)
    limits.enter(one, 150).settle(150)
    error = refused(lambda: limits.enter(one, 1))
    assert error.headers["Retry-After"] == "60"  # until midnight in UTC
    clock.seconds += 60
    limits.enter(one, 1000)


def test_sums_of_yesterday_that_come_late_are_not_taken_for_todays(limits: Limits, clock: Clock) -> None:
    clock.seconds += 60
    limits.sync_day(date(2026, 11, 30), {1: 1000}, {})
    limits.enter(caller(tokens_per_day=1000), 1000)


def test_headers_are_openais(limits: Limits, clock: Clock) -> None:
    headers: dict[str, str] = {}
    token = told.set(headers)
    try:
        limits.enter(caller(requests_per_minute=60, tokens_per_minute=1000), 100)
    finally:
        told.reset(token)
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "900",
        "x-ratelimit-reset-tokens": "1m1s",
    }
    error = refused(lambda: limits.enter(caller(requests_per_minute=60, tokens_per_minute=1000), 901))
    assert error.headers["x-ratelimit-remaining-tokens"] == "900"


@pytest.mark.parametrize(("seconds", "text"), [(0.0204, "21ms"), (1, "1s"), (59.96, "1m0s"), (61.04, "1m1s"), (360, "6m0s")])
def test_spans_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert span(seconds) == text


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=60),
    st.integers(20, 120),
)
def test_no_minute_holds_more_than_the_limit(steps: list[tuple[float, int, int]], limit: int) -> None:
    """Against every entry that was let in, kept in full: what a window in slots must never exceed."""
    window, now, let_in = Window(), 0.0, []
    for pause, amount, used in steps:
        now += pause
        if window.used(now) + amount <= limit:
            slot = window.add(now, amount)
            window.give_back(slot, amount - min(used, amount))
            let_in.append((now, min(used, amount)))
        elif amount <= limit:
            wait = window.seconds_until(now, limit - amount)
            assert wait > 0
            assert copy.deepcopy(window).used(now + wait) + amount <= limit
    for end, _ in let_in:
        assert sum(amount for moment, amount in let_in if end - 60 < moment <= end) <= limit
