"""Who runs in the next step. Plain Python: no tensor, no clock (callers pass the time in), no thread.

1. Every row that decodes is in every step; prompts are read in chunks beside them, a started one before the next.
2. A request is admitted with all the memory it can need (prompt + answer), so nothing that runs is ever put out again.
3. The tenant with the lowest counter goes first, in it the mix of adapters with the lowest (input + output_weight * output).
4. A tenant that got nothing for max_wait_seconds goes before the others, once. So does a mix of a tenant, of those whose tenant
   is not at the front by its counter one in max_active_seconds: who has many mixes cannot live on their being overdue.
5. At most max_active_adapters are active; one leaves only when no row uses it and its place is needed.
6. A request that finds no place in the active set is passed by others, but not by rows of adapters that have run for
   max_active_seconds, unless these come before it by their counters. The bare base needs no place and is never held up by it.
7. An overdue request without room is held: until it is in, others pass only if they leave its memory, its row and the set alone.
   So it is in after max_active_seconds and the steps of the longest request that runs.
8. Requests of an adapter that is still loading are in nobody's way. 9. What can never run, or finds the queue full, is refused.
10. A step looks at its rows and the heads of a few queues, never at all that wait.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import Field

from luthier.core.errors import QueueFullError, RequestError
from luthier.core.settings import Settings
from luthier.engine.active_set import ActiveSet
from luthier.engine.fairness import Turns

# Of so many tenants, and of so many mixes in each, the first request is tried before the rest of the step is left unfilled.
LOOK = 4


class Limits(Settings):
    """What the engine may have in hand at a time."""

    max_rows: int = Field(default=32, ge=1, description="requests that run at a time")
    prefill_tokens: int = Field(default=512, ge=1, description="prompt tokens that are read in one step")
    kv_tokens: int = Field(ge=1, description="tokens of all running requests, prompts and whole answers together")
    max_request_tokens: int | None = Field(
        default=None, ge=1, description="tokens of one request: the model's room; None: kv_tokens"
    )
    max_active_adapters: int = Field(default=8, ge=1, description="different adapters in one step")
    max_queue: int = Field(default=1024, ge=1, description="requests that wait")
    max_queue_per_tenant: int | None = Field(default=None, ge=1, description="requests of one tenant that wait; None: max_queue")
    max_wait_seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False, description="who got nothing for so long goes first")
    max_active_seconds: float = Field(
        default=2.0, ge=0, allow_inf_nan=False, description="after so long an adapter makes way for others that wait for a place"
    )
    output_weight: float = Field(
        default=2.0, ge=0, allow_inf_nan=False, description="what a token of an answer counts, of a prompt 1"
    )


@dataclass(frozen=True)
class Ticket:
    """A request, as the scheduler sees it. `cached_tokens` of the prompt need not be read again."""

    id: str
    tenant: str
    adapters: tuple[str, ...]
    prompt_tokens: int
    max_new_tokens: int
    cached_tokens: int = 0
    arrived: float = 0.0

    @property
    def tokens(self) -> int:
        """What it may come to hold in the cache."""
        return self.prompt_tokens + self.max_new_tokens


@dataclass(frozen=True)
class Chunk:
    """Prompt tokens [start, stop) of a request."""

    id: str
    start: int
    stop: int


@dataclass(frozen=True)
class Step:
    """What the runner does next: open the admitted, change the active set, read the chunks, and decode one token of each row.

    Rows of one adapter lie side by side. A request whose last chunk is read gives its first token in that step.
    """

    prefill: tuple[Chunk, ...] = ()
    decode: tuple[str, ...] = ()
    admitted: tuple[str, ...] = ()
    activated: tuple[str, ...] = ()
    deactivated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Figures for metrics. Counters are the cost so far of those that wait, run, or left not long ago."""

    waiting: int
    loading: int
    prefilling: int
    decoding: int
    kv_tokens: int
    active: tuple[str, ...]
    tenants: dict[str, float]
    longest_wait_seconds: float


@dataclass(eq=False)
class _Tenant:
    name: str
    counter: float = 0.0
    waiting: int = 0
    running: int = 0
    queues: "dict[tuple[str, ...], _Queue]" = field(default_factory=dict)
    turns: "Turns[_Queue]" = field(default_factory=lambda: Turns(lambda queue: queue.counter))
    rescued: float = -math.inf  # when an overdue mix of it last came in


@dataclass(eq=False)
class _Queue:
    """The waiting requests of one tenant for one mix of adapters, first come first served."""

    tenant: _Tenant
    mix: tuple[str, ...]
    counter: float = 0.0
    running: int = 0
    tickets: OrderedDict[str, Ticket] = field(default_factory=OrderedDict)

    @property
    def head(self) -> Ticket:
        return next(iter(self.tickets.values()))


@dataclass(eq=False)
class _Lane:
    """The queues of all tenants for one mix. Only a lane whose adapters are all ready has turns."""

    queues: dict[_Queue, None] = field(default_factory=dict)
    turns: Turns[_Queue] = field(default_factory=lambda: Turns(lambda queue: queue.tenant.counter))


@dataclass(eq=False)
class _Row:
    """A running request: `read` tokens of its prompt are planned, `made` tokens of its answer are known."""

    ticket: Ticket
    queue: _Queue
    read: int
    made: int = 0


class Scheduler:
    """Decides who runs. Use: add, mark_ready when the weights are there, then plan, and made/finish after each step."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._now = 0.0
        self._active = ActiveSet(limits.max_active_adapters)
        self._ready: set[str] = set()
        self._waiting: dict[str, _Queue] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._turns: Turns[_Tenant] = Turns(lambda tenant: tenant.counter)
        # Tenants by how long their longest waiting mix has got nothing, or by when such a one last came in.
        self._late: Turns[_Tenant] = Turns(lambda tenant: max(tenant.rescued, tenant.turns.oldest()))
        self._lanes: dict[tuple[str, ...], _Lane] = {}
        self._lanes_of: dict[str, dict[tuple[str, ...], _Lane]] = {}
        self._idle: OrderedDict[_Tenant | _Queue, float] = OrderedDict()
        self._prefilling: OrderedDict[str, _Row] = OrderedDict()
        self._decoding: dict[str, _Row] = {}
        self._held: str | None = None
        self._kv_tokens = 0
        self._unread = 0

    # --- what callers report ---------------------------------------------------------------------------------

    def check(self, ticket: Ticket) -> None:
        """Raise RequestError if a request can never run."""
        faults = self._faults(ticket)
        if faults:
            raise RequestError(f"request '{ticket.id}' cannot be served:\n" + "\n".join(f"  {fault}" for fault in faults))

    def check_queue(self, tenant: str, ahead: int = 0, ahead_of_tenant: int = 0) -> None:
        """Raise QueueFullError if too many requests wait, counting `ahead` that are not added yet, some of them the tenant's."""
        known, limit = self._tenants.get(tenant), self.limits.max_queue_per_tenant
        waiting, of_tenant = len(self._waiting) + ahead, (known.waiting if known else 0) + ahead_of_tenant
        if waiting >= self.limits.max_queue:
            raise QueueFullError("the queue", waiting, self.limits.max_queue)
        if limit is not None and of_tenant >= limit:
            raise QueueFullError(f"the queue of tenant '{tenant}'", of_tenant, limit)

    def add(self, ticket: Ticket) -> None:
        """Let a request wait. Raises RequestError if it can never run, QueueFullError if too many wait already."""
        self.check(ticket)
        self._now = max(self._now, ticket.arrived)
        self.check_queue(ticket.tenant)
        tenant = self._tenants.setdefault(ticket.tenant, _Tenant(ticket.tenant))
        self._idle.pop(tenant, None)
        mix = tuple(sorted(ticket.adapters))
        queue = tenant.queues.setdefault(mix, _Queue(tenant, mix))
        self._idle.pop(queue, None)
        queue.tickets[ticket.id] = ticket
        tenant.waiting += 1
        self._waiting[ticket.id] = queue
        lane = self._lanes.setdefault(mix, _Lane())
        lane.queues[queue] = None
        for adapter in mix:
            self._lanes_of.setdefault(adapter, {})[mix] = lane
        if self._ready.issuperset(mix):
            self._open(queue)

    def mark_ready(self, adapter: str) -> None:
        """Report that an adapter's weights are in memory: its requests may run."""
        self._ready.add(adapter)
        for mix, lane in self._lanes_of.get(adapter, {}).items():
            if self._ready.issuperset(mix):
                for queue in lane.queues:
                    self._open(queue)

    def mark_failed(self, adapter: str) -> tuple[str, ...]:
        """Report that an adapter cannot be loaded, or is taken away; return the waiting requests that fail with it.

        Rows of it that run go on; it leaves the active set after them.
        """
        self._ready.discard(adapter)
        self._active.retire(adapter)
        queues = [queue for lane in self._lanes_of.get(adapter, {}).values() for queue in lane.queues]
        failed = tuple(id for queue in queues for id in queue.tickets)
        for id in failed:
            self._unqueue(id)
        return failed

    def made(self, id: str, tokens: int) -> None:
        """Report how many tokens of the answer a request got from the last step."""
        row = self._decoding[id]
        row.made += tokens
        assert row.made <= row.ticket.max_new_tokens, f"request '{id}' has more tokens than it has room for"
        self._charge(row.queue, self.limits.output_weight * tokens)

    def finish(self, id: str) -> None:
        """Report that a running request is done: its memory is free."""
        row = self._decoding.pop(id, None)
        if row is None:
            row = self._prefilling.pop(id)
            self._unread -= row.ticket.prompt_tokens - row.read
        self._kv_tokens -= row.ticket.tokens
        self._active.leave(row.queue.mix)
        row.queue.running -= 1
        row.queue.tenant.running -= 1
        self._rest(row.queue)

    def cancel(self, id: str) -> bool:
        """Take a request out wherever it is; return whether it was there (it may just have finished)."""
        if id in self._waiting:
            self._unqueue(id)
        elif id in self._decoding or id in self._prefilling:
            self.finish(id)
        else:
            return False
        return True

    # --- the next step ---------------------------------------------------------------------------------------

    def plan(self, now: float) -> Step | None:
        """Return the next step, or None if there is nothing to do. A step that is planned counts as done."""
        self._now = max(self._now, now)
        self._forget()
        decode = sorted(self._decoding, key=lambda id: self._decoding[id].queue.mix)
        admitted: list[str] = []
        activated: list[str] = []
        deactivated = self._active.drop_retired()
        # No more than this step can read: who comes next is better decided in the next step.
        while self._unread < self.limits.prefill_tokens and (queue := self._next()):
            ticket = self._start(queue)
            new, gone = self._active.take(queue.mix, self._now)
            admitted.append(ticket.id)
            deactivated += gone
            for adapter in new:  # one that went out for another a moment ago just stays
                if adapter in deactivated:
                    deactivated.remove(adapter)
                else:
                    activated.append(adapter)
        step = Step(self._read(), tuple(decode), tuple(admitted), tuple(activated), tuple(deactivated))
        return None if step == Step() else step

    def snapshot(self) -> Snapshot:
        """Return what runs and waits; walks over all that wait, so it is for now and then."""
        heads = [self._waiting[id].tickets[id].arrived for id in self._waiting]
        return Snapshot(
            waiting=len(self._waiting),
            loading=sum(not self._ready.issuperset(queue.mix) for queue in self._waiting.values()),
            prefilling=len(self._prefilling),
            decoding=len(self._decoding),
            kv_tokens=self._kv_tokens,
            active=self._active.names(),
            tenants={name: tenant.counter for name, tenant in self._tenants.items()},
            longest_wait_seconds=self._now - min(heads, default=self._now),
        )

    def _next(self) -> _Queue | None:
        """Return the queue whose first request is admitted now, if any is."""
        held: Ticket | None = None
        is_behind = False  # behind a request that waits for a place in the active set
        for queue, is_overdue in self._order():
            ticket = queue.head
            has_place = self._active.fits(queue.mix)
            is_open = not is_behind or self._active.open_behind(queue.mix, self._now, self.limits.max_active_seconds)
            if has_place and is_open and self._has_room(ticket, held):
                return queue
            is_behind = is_behind or not has_place
            if is_overdue and held is None:
                held, is_behind = ticket, True
                self._held = ticket.id
        return None

    def _order(self) -> Iterator[tuple[_Queue, bool]]:
        """Yield (queue, is overdue) of those that may come next, best first; a queue may come twice."""
        if self._held is not None:
            yield self._waiting[self._held], True
        before = self._now - self.limits.max_wait_seconds
        late_tenant = self._turns.overdue(before)
        for tenant in self._late.first(LOOK):
            late_queue = tenant.turns.overdue(before)
            if late_queue and tenant.rescued <= self._now - self.limits.max_active_seconds:
                yield late_queue, True
        for tenant in ([late_tenant] if late_tenant else []) + self._turns.first(LOOK):
            late_queue = tenant.turns.overdue(before)
            if late_queue:
                yield late_queue, True
            for queue in tenant.turns.first(LOOK):
                yield queue, tenant is late_tenant
        lanes: dict[tuple[str, ...], _Lane | None] = {(): self._lanes.get(())}
        for adapter in self._active.names():
            lanes |= {mix: lane for mix, lane in self._lanes_of.get(adapter, {}).items() if self._active.has(mix)}
        firsts = [queue for lane in lanes.values() if lane for queue in lane.turns.first(1)]
        for queue in sorted(firsts, key=lambda queue: (queue.tenant.counter, queue.counter)):
            yield queue, False

    def _has_room(self, ticket: Ticket, held: Ticket | None) -> bool:
        rows = len(self._prefilling) + len(self._decoding) + 1 + (held is not None)
        tokens = self._kv_tokens + ticket.tokens + (held.tokens if held else 0)
        return rows <= self.limits.max_rows and tokens <= self.limits.kv_tokens

    def _start(self, queue: _Queue) -> Ticket:
        ticket = queue.head
        queue.running += 1
        queue.tenant.running += 1
        if queue.tenant.turns.overdue(self._now - self.limits.max_wait_seconds) is queue:
            queue.tenant.rescued = self._now
        queue.tenant.turns.served(queue, self._now)
        self._turns.served(queue.tenant, self._now)
        self._charge(queue, ticket.prompt_tokens - ticket.cached_tokens)
        self._unqueue(ticket.id)
        self._kv_tokens += ticket.tokens
        self._unread += ticket.prompt_tokens - ticket.cached_tokens
        self._prefilling[ticket.id] = _Row(ticket, queue, ticket.cached_tokens)
        return ticket

    def _read(self) -> tuple[Chunk, ...]:
        """Plan the chunks of this step in the order of admission, so that what is started is finished first."""
        chunks: list[tuple[tuple[str, ...], Chunk]] = []
        left = self.limits.prefill_tokens
        while left and self._prefilling:
            id, row = next(iter(self._prefilling.items()))
            stop = min(row.read + left, row.ticket.prompt_tokens)
            chunks.append((row.queue.mix, Chunk(id, row.read, stop)))
            left -= stop - row.read
            self._unread -= stop - row.read
            row.read = stop
            if stop == row.ticket.prompt_tokens:
                self._decoding[id] = self._prefilling.pop(id)
        return tuple(chunk for _, chunk in sorted(chunks, key=lambda pair: pair[0]))

    # --- queues ----------------------------------------------------------------------------------------------

    def _faults(self, ticket: Ticket) -> list[str]:
        limits = self.limits
        room = min(limits.kv_tokens, limits.max_request_tokens or limits.kv_tokens)
        faults = []
        if ticket.id in self._waiting or ticket.id in self._prefilling or ticket.id in self._decoding:
            faults.append("another request of this id waits or runs; give each its own")
        if ticket.prompt_tokens < 1 or ticket.max_new_tokens < 1:
            faults.append(f"{ticket.prompt_tokens} tokens of prompt and {ticket.max_new_tokens} of answer; needs one of each")
        if not 0 <= ticket.cached_tokens < max(ticket.prompt_tokens, 1):
            faults.append(f"{ticket.cached_tokens} of {ticket.prompt_tokens} prompt tokens are cached; one must be left to read")
        if ticket.tokens > room:
            faults.append(
                f"{ticket.prompt_tokens} tokens of prompt and up to {ticket.max_new_tokens} of answer are {ticket.tokens}; "
                f"there is room for {room}. Shorten the prompt or ask for a shorter answer"
            )
        if len(set(ticket.adapters)) < len(ticket.adapters):
            faults.append(f"an adapter is named twice: {', '.join(ticket.adapters)}")
        if len(ticket.adapters) > limits.max_active_adapters:
            faults.append(f"{len(ticket.adapters)} adapters, of which {limits.max_active_adapters} can be active at a time")
        return faults

    def _open(self, queue: _Queue) -> None:
        """Let a queue take part whose adapters are ready."""
        tenant, lane = queue.tenant, self._lanes[queue.mix]
        if queue in tenant.turns:
            return
        if tenant not in self._turns:
            tenant.counter = max(tenant.counter, self._turns.floor())
            self._turns.enter(tenant, self._now)
        queue.counter = max(queue.counter, tenant.turns.floor())
        tenant.turns.enter(queue, self._now)
        if tenant not in self._late:
            self._late.enter(tenant, self._now)
        lane.turns.enter(queue, self._now)

    def _unqueue(self, id: str) -> None:
        queue = self._waiting.pop(id)
        tenant, lane = queue.tenant, self._lanes[queue.mix]
        del queue.tickets[id]
        tenant.waiting -= 1
        if id == self._held:
            self._held = None
        if queue.tickets:
            return
        del lane.queues[queue]
        if queue in tenant.turns:
            tenant.turns.leave(queue)
            lane.turns.leave(queue)
            if not len(tenant.turns):
                self._turns.leave(tenant)
                self._late.leave(tenant)
        if not lane.queues:
            del self._lanes[queue.mix]
            for adapter in queue.mix:
                del self._lanes_of[adapter][queue.mix]
                if not self._lanes_of[adapter]:
                    del self._lanes_of[adapter]
        self._rest(queue)

    def _charge(self, queue: _Queue, cost: float) -> None:
        queue.counter += cost
        queue.tenant.counter += cost

    def _rest(self, queue: _Queue) -> None:
        if not queue.tickets and not queue.running:
            self._idle[queue] = self._now
        if not queue.tenant.waiting and not queue.tenant.running:
            self._idle[queue.tenant] = self._now

    def _forget(self) -> None:
        """Drop tenants and mixes that did nothing for max_wait_seconds: no debt is older, and names do not pile up."""
        while self._idle:
            idle, since = next(iter(self._idle.items()))
            if since > self._now - self.limits.max_wait_seconds:
                return
            del self._idle[idle]
            if isinstance(idle, _Queue):
                del idle.tenant.queues[idle.mix]
            else:
                del self._tenants[idle.name]
