"""Limits: what a tenant may have begun within a minute, used up within a day, and have under way at once.

    enter     prompt and the longest answer are reserved, or the request is refused with 429 and told when to come back
    settle    what it really took takes the place of what was reserved

So a burst cannot run over a quota of tokens: what might come of those under way is counted already. The minute slides, in slots
of a second: in no 60 seconds does more begin than is allowed, and what is free again is so at most a second late. The
minute is each gateway's own: n gateways let through n times as much. The day (UTC) is the registry's sum of all gateways, read
every few seconds, with what this one has not told it yet; so several gateways may together run over by what they let in between
two reads.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

from luthier.registry.view import Caller
from luthier.serve.errors import ApiError, too_many

MINUTE = 60
SLOT_SECONDS = 1.0
AT_ONCE_SECONDS = 1.0
"""When to come back where nobody knows when a running request will end."""

told: ContextVar[dict[str, str] | None] = ContextVar("luthier_rate_limits", default=None)
"""The headers of the present request's answer that tell how much is left; `app.RateHeaders` sends them."""


class Window:
    """The sum of what was added within the last minute."""

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()
        self._sum = 0

    def add(self, now: float, amount: int) -> int:
        """Count an amount; return its slot, for `give_back`."""
        self.used(now)
        slot = int(now // SLOT_SECONDS)
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append([slot, 0])
        self._slots[-1][1] += amount
        self._sum += amount
        return slot

    def give_back(self, slot: int, amount: int) -> None:
        """Count less (or, below zero, more) in a slot, if it still counts."""
        for each in self._slots:
            if each[0] == slot:
                each[1] -= amount
                self._sum -= amount

    def used(self, now: float) -> int:
        """Return the sum. A slot counts until its youngest entry is a minute old."""
        while self._slots and self._leaves_at(self._slots[0][0]) <= now:
            self._sum -= self._slots.popleft()[1]
        return self._sum

    def seconds_until(self, now: float, room: int) -> float:
        """Return how long it takes until at most `room` of what counts now is left."""
        left = self.used(now)
        for slot, amount in self._slots:
            if left <= room:
                break
            left -= amount
            if left <= room:
                return self._leaves_at(slot) - now
        return 0.0

    @staticmethod
    def _leaves_at(slot: int) -> float:
        return (slot + 1) * SLOT_SECONDS + MINUTE


@dataclass
class _Use:
    """What one tenant uses. `recorded` is the registry's sum for the day, `unsent` what it has not been told yet."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)
    running: int = 0
    reserved: int = 0
    recorded: int = 0
    unsent: int = 0


class Permit:
    """A request that was let in; `settle` ends it."""

    def __init__(self, limits: "Limits", use: _Use, slot: int, tokens: int):
        self._limits, self._use, self._slot, self._tokens = limits, use, slot, tokens
        self._is_open = True

    def settle(self, tokens: int) -> None:
        """Say how many tokens it took, of prompt and answer. Only the first word counts."""
        if self._is_open:
            self._is_open = False
            self._limits._leave(self._use, self._slot, self._tokens, tokens)


class Limits:
    """Every tenant's use, in this process. `clock` is for spans, `today` for the day of quotas; used from one thread only."""

    def __init__(
        self,
        max_running: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ):
        self.max_running, self._clock, self._now = max_running, clock, now
        self._uses: dict[int, _Use] = {}
        self._running = 0
        self._day = now().date()

    @property
    def running(self) -> int:
        """How many requests are under way."""
        return self._running

    def enter(self, caller: Caller, tokens: int) -> Permit:
        """Let a request in that may take so many tokens. Raises: ApiError 429, or 400 for one that never fits its quota."""
        now, use, quotas = self._clock(), self._use(caller.tenant_id), caller.quotas
        if self._running >= self.max_running:
            raise too_many(f"{self._running} requests are under way, which is all that this server takes.", code="queue_full")
        for name, limit in (("minute", quotas.tokens_per_minute), ("day", quotas.tokens_per_day)):
            if limit is not None and tokens > limit:
                raise _never(tokens, limit, name)
        refusals = [
            _refusal("concurrent requests", quotas.concurrent, use.running, 1, lambda _: AT_ONCE_SECONDS),
            _refusal(
                "requests per minute", quotas.requests_per_minute, use.requests.used(now), 1,
                lambda room: use.requests.seconds_until(now, room),
            ),
            _refusal(
                "tokens per minute", quotas.tokens_per_minute, use.tokens.used(now), tokens,
                lambda room: use.tokens.seconds_until(now, room),
            ),
            _refusal(
                "tokens per day", quotas.tokens_per_day, use.recorded + use.unsent + use.reserved, tokens,
                lambda _: self._seconds_left(),
            ),
        ]  # fmt: skip
        if refused := [refusal for refusal in refusals if refusal is not None]:
            seconds, message = max(refused)
            raise too_many(message, math.ceil(seconds), headers=self._headers(caller, use, now))
        self._running += 1
        use.running += 1
        use.reserved += tokens
        use.requests.add(now, 1)
        slot = use.tokens.add(now, tokens)
        if (headers := told.get()) is not None:
            headers.update(self._headers(caller, use, now))
        return Permit(self, use, slot, tokens)

    def sync_day(self, day: date, recorded: Mapping[int, int], unsent: Mapping[int, int]) -> None:
        """Take over the registry's sums of tokens by tenant for a day, and what of that day has not been sent to it."""
        if day != self._now().date():
            return
        self._begin_day(day)
        for tenant_id in self._uses.keys() | recorded.keys() | unsent.keys():
            use = self._uses.setdefault(tenant_id, _Use())
            use.recorded, use.unsent = recorded.get(tenant_id, 0), unsent.get(tenant_id, 0)

    def _use(self, tenant_id: int) -> _Use:
        self._begin_day(self._now().date())
        return self._uses.setdefault(tenant_id, _Use())

    def _begin_day(self, day: date) -> None:
        if day != self._day:
            self._day = day
            for use in self._uses.values():
                use.recorded = use.unsent = 0

    def _leave(self, use: _Use, slot: int, reserved: int, tokens: int) -> None:
        self._begin_day(self._now().date())
        self._running -= 1
        use.running -= 1
        use.reserved -= reserved
        use.unsent += tokens
        use.tokens.give_back(slot, reserved - tokens)

    def _seconds_left(self) -> float:
        now = self._now()
        midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
        return (midnight - now).total_seconds()

    def _headers(self, caller: Caller, use: _Use, now: float) -> dict[str, str]:
        """OpenAI's headers, for the limits of a minute that this caller has."""
        headers: dict[str, str] = {}
        for name, limit, window in (
            ("requests", caller.quotas.requests_per_minute, use.requests),
            ("tokens", caller.quotas.tokens_per_minute, use.tokens),
        ):
            if limit is not None:
                headers[f"x-ratelimit-limit-{name}"] = str(limit)
                headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - window.used(now)))
                headers[f"x-ratelimit-reset-{name}"] = span(window.seconds_until(now, 0))
        return headers


def span(seconds: float) -> str:
    """Return a span as OpenAI writes it: 6m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 1), 60)
    return f"{f'{minutes:.0f}m' if minutes else ''}{rest:g}s"


def _refusal(what: str, limit: int | None, used: int, wanted: int, wait: Callable[[int], float]) -> tuple[float, str] | None:
    """How long to wait for room and what to say, or None where there is room."""
    if limit is None or used + wanted <= limit:
        return None
    asked = f", {wanted} more were asked for" if wanted != 1 else ""
    return wait(limit - wanted), f"The limit of {limit} {what} is reached: {used} are used or reserved{asked}."


def _never(tokens: int, limit: int, span_name: str) -> ApiError:
    return ApiError(
        400,
        f"Prompt and answer may come to {tokens} tokens; this tenant has {limit} a {span_name}. Send less, or ask for a shorter "
        "answer (max_tokens).",
        code="tokens_over_quota",
    )
