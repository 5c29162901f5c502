"""Invariants of the scheduler on simulated steps: no clock, no threads, seeded arrivals."""

import random
import sys
from collections import Counter

import pytest

from luthier.core.errors import ConfigError, LuthierError, QueueFullError, RequestError
from luthier.engine.scheduler import Limits, Scheduler, Step, Ticket

STEP_SECONDS = 0.05


class Engine:
    """Runs planned steps as the engine would, and checks on each that nobody got what the limits forbid."""

    def __init__(self, scheduler: Scheduler, rng: random.Random | None = None):
        self.scheduler, self.limits, self.rng = scheduler, scheduler.limits, rng
        self.now = 0.0
        self.tickets: dict[str, Ticket] = {}
        self.running: dict[str, int] = {}  # tokens of the answer so far; -1 while the prompt is read
        self.read: dict[str, int] = {}
        self.active: set[str] = set()
        self.waits: dict[str, float] = {}
        self.cost: Counter[str] = Counter()
        self.done: list[str] = []

    def add(self, id: str, tenant: str = "t", adapters: tuple[str, ...] = (), prompt: int = 10, new: int = 5, cached: int = 0):
        ticket = Ticket(id, tenant, adapters, prompt, new, cached, self.now)
        self.scheduler.add(ticket)
        self.tickets[id] = ticket

    @property
    def waiting(self) -> int:
        return len(self.tickets) - len(self.waits)

    def cancel(self, id: str) -> bool:
        self.running.pop(id, None)
        return self.scheduler.cancel(id)

    def step(self) -> Step | None:
        step = self.scheduler.plan(self.now)
        self.now += STEP_SECONDS
        if step is not None:
            self.check(step)
            self.run(step)
        return step

    def check(self, step: Step) -> None:
        limits = self.limits
        assert sorted(step.decode) == sorted(id for id, made in self.running.items() if made >= 0), "every decode row is in"
        assert sum(chunk.stop - chunk.start for chunk in step.prefill) <= limits.prefill_tokens
        for adapter in step.deactivated:
            assert adapter not in {name for id in self.running for name in self.tickets[id].adapters}, "still in use"
        assert not set(step.activated) & self.active
        assert set(step.deactivated) <= self.active | set(step.activated)
        self.active = (self.active | set(step.activated)) - set(step.deactivated)
        assert len(self.active) <= limits.max_active_adapters
        for id in step.admitted:
            assert id not in self.running
            self.running[id], self.read[id] = -1, self.tickets[id].cached_tokens
            self.waits[id] = self.now - STEP_SECONDS - self.tickets[id].arrived
        for id in [chunk.id for chunk in step.prefill] + list(step.decode):
            assert set(self.tickets[id].adapters) <= self.active
        assert len(self.running) <= limits.max_rows
        held = sum(self.tickets[id].tokens for id in self.running)
        assert held <= limits.kv_tokens
        mixes = [tuple(sorted(self.tickets[id].adapters)) for id in step.decode]
        assert mixes == sorted(mixes), "rows of one adapter lie side by side"

    def run(self, step: Step) -> None:
        made = list(step.decode)
        for chunk in step.prefill:
            assert chunk.start == self.read[chunk.id] < chunk.stop
            self.read[chunk.id] = chunk.stop
            self.cost[self.tickets[chunk.id].tenant] += chunk.stop - chunk.start
            if chunk.stop == self.tickets[chunk.id].prompt_tokens:
                self.running[chunk.id] = 0
                made.append(chunk.id)
        for id in made:
            self.running[id] += 1
            self.scheduler.made(id, 1)
            self.cost[self.tickets[id].tenant] += self.limits.output_weight
            ends_early = self.rng is not None and self.rng.random() < 0.02
            if self.running[id] == self.tickets[id].max_new_tokens or ends_early:
                self.scheduler.finish(id)
                del self.running[id]
                self.done.append(id)

    def drain(self, most: int = 100_000) -> int:
        for steps in range(most):
            if self.step() is None:
                return steps
        raise AssertionError("requests are left over")


def engine(rng: random.Random | None = None, **limits: object) -> Engine:
    return Engine(Scheduler(Limits(**{"kv_tokens": 4096} | limits)), rng)


def is_empty(scheduler: Scheduler) -> bool:
    seen = scheduler.snapshot()
    return (seen.waiting, seen.prefilling, seen.decoding, seen.kv_tokens) == (0, 0, 0, 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic_keeps_every_limit_and_leaves_nothing_behind(seed: int) -> None:
    rng = random.Random(seed)
    run = engine(rng, max_rows=rng.choice([3, 8, 32]), prefill_tokens=rng.choice([7, 64]), kv_tokens=900, max_active_adapters=3)
    adapters = [f"a{i}" for i in range(12)]
    loading, cancelled, failed = set(adapters), set(), set()
    for number in range(2000):
        if rng.random() < 0.25:
            mix = tuple(rng.sample(adapters, rng.choice([0, 1, 1, 1, 2, 3])))
            try:
                run.add(f"r{number}", f"t{rng.randrange(5)}", mix, rng.randint(1, 200), rng.randint(1, 40))
            except QueueFullError:
                pytest.fail("the queue is large enough")
        if loading and rng.random() < 0.05:
            adapter = rng.choice(sorted(loading))
            loading.remove(adapter)
            run.scheduler.mark_ready(adapter)
        if rng.random() < 0.01:
            adapter = rng.choice(adapters)
            loading.add(adapter)
            ids = run.scheduler.mark_failed(adapter)
            assert all(adapter in run.tickets[id].adapters and id not in run.running for id in ids)
            failed |= set(ids)
        if run.tickets and rng.random() < 0.05:
            id = rng.choice(list(run.tickets))
            if run.cancel(id):
                cancelled.add(id)
        run.step()
    for adapter in sorted(loading):
        run.scheduler.mark_ready(adapter)
    run.drain()
    assert is_empty(run.scheduler)
    assert not failed & cancelled and not failed & set(run.done)
    assert set(run.tickets) == set(run.done) | cancelled | failed
    assert len(cancelled) > 10 and len(failed) > 0 and len(run.done) > 100


def test_a_long_prompt_is_read_in_chunks_beside_the_rows_that_decode_and_finished_before_the_next() -> None:
    run = engine(prefill_tokens=64)
    run.add("short", prompt=10, new=50)
    run.step()
    run.add("long", prompt=150, new=2, cached=6)
    run.add("next", prompt=100, new=2)
    steps = [run.step() for _ in range(5)]
    seen = [[(chunk.id, chunk.start, chunk.stop) for chunk in step.prefill] for step in steps if step]
    assert seen == [
        [("long", 6, 70)],
        [("long", 70, 134)],
        [("long", 134, 150), ("next", 0, 48)],
        [("next", 48, 100)],
        [],
    ]
    assert all(step and "short" in step.decode for step in steps)


def share_of_two(asked_by_other: float, seed: int, same_tenant: bool) -> tuple[float, float, float]:
    """Return (cost of the flooder, cost of the other, cost the other asked for) while one floods."""
    rng = random.Random(seed)
    run = engine(max_rows=4, kv_tokens=100_000, max_queue=100_000)
    for adapter in ("flood", "steady"):
        run.scheduler.mark_ready(adapter)
    due, asked, number = 0.0, 0.0, 0
    for turn in range(3000):
        due += asked_by_other
        for kind in ["flood"] * (10 if turn % 10 == 0 else 0) + ["steady"] * int(due):
            number += 1
            prompt, new = rng.randint(5, 40), rng.randint(5, 30)
            tenant = "one" if same_tenant else kind
            run.add(f"{kind}{number}", tenant, (kind,) if same_tenant else (), prompt, new)
            if kind == "steady":
                asked += prompt + 2 * new
                due -= 1
        run.step()
    cost: Counter[str] = Counter()
    for id, ticket in run.tickets.items():
        if id in run.waits:
            kind = "flood" if id.startswith("flood") else "steady"
            made = ticket.max_new_tokens if id in run.done else max(run.running[id], 0)
            cost[kind] += run.read[id] + 2 * made
    return cost["flood"], cost["steady"], asked


@pytest.mark.parametrize("same_tenant", [False, True], ids=["two tenants", "two adapters of one tenant"])
@pytest.mark.parametrize("seed", range(3))
def test_a_flood_leaves_the_other_its_fair_share(seed: int, same_tenant: bool) -> None:
    flood, steady, asked = share_of_two(0.25, seed, same_tenant)
    assert asked > 1.2 * steady, "the other asks for more than its share"
    assert steady >= 0.49 * (flood + steady)


@pytest.mark.parametrize("same_tenant", [False, True], ids=["two tenants", "two adapters of one tenant"])
def test_who_asks_for_less_gets_it_all_and_the_flooder_gets_the_rest(same_tenant: bool) -> None:
    alone, _, _ = share_of_two(0.0, 0, same_tenant)
    flood, steady, asked = share_of_two(0.05, 0, same_tenant)
    assert steady >= 0.97 * asked
    assert flood + steady >= 0.97 * alone


@pytest.mark.parametrize("idle_seconds", [1.0, 1000.0])
def test_a_pause_gives_neither_credit_nor_debt(idle_seconds: float) -> None:
    run = engine(max_rows=2, kv_tokens=100_000, max_queue=100_000)
    for number in range(40):
        run.add(f"old{number}", "old", (), 10, 10)
    run.drain()
    run.now += idle_seconds
    for number in range(400):
        run.add(f"busy{number}", "busy", (), 10, 10)
    for _ in range(300):
        run.step()
    for number in range(400):
        run.add(f"back{number}", "old", (), 10, 10)
        run.add(f"new{number}", "new", (), 10, 10)
    before = dict(run.cost)
    for _ in range(900):
        run.step()
    got = [run.cost[tenant] - before.get(tenant, 0) for tenant in ("old", "busy", "new")]
    assert max(got) - min(got) <= 4 * 30, got  # a few requests of cost 30


def zipf(rng: random.Random, adapters: int) -> str:
    return f"a{rng.choices(range(adapters), [1 / (rank + 1) for rank in range(adapters)])[0]}"


@pytest.mark.parametrize("tenants", [1, 20])
@pytest.mark.parametrize("seed", range(2))
def test_no_request_waits_for_ever_while_300_zipf_adapters_pass_through_8_places(seed: int, tenants: int) -> None:
    rng = random.Random(seed)
    run = engine(max_rows=32, kv_tokens=100_000, max_queue=100_000, max_wait_seconds=5.0, max_active_seconds=1.0)
    for number in range(300):
        run.scheduler.mark_ready(f"a{number}")
    waiting_before: dict[str, int] = {}
    number, longest = 0, 30
    for _ in range(2000):
        while run.waiting + len(run.running) < 64:  # closed loop of 64 clients: never a quiet moment
            number += 1
            waiting_before[f"r{number}"] = run.waiting
            run.add(f"r{number}", f"t{rng.randrange(tenants)}", (zipf(rng, 300),), rng.randint(5, 40), rng.randint(5, longest))
        run.step()
    run.drain()
    assert set(run.done) == set(run.tickets)
    rotation = 1.0 + (longest + 1) * STEP_SECONDS
    assert number > 1000
    # One rotation gives at least one of those that wait a place; in fact several places come free in it.
    assert all(wait <= 5.0 + (waiting_before[id] + 1) * rotation for id, wait in run.waits.items())
    assert max(run.waits.values()) <= 5.0 + 8 * rotation


@pytest.mark.parametrize("seed", range(3))
def test_a_rare_adapter_comes_in_while_eight_popular_ones_never_pause(seed: int) -> None:
    rng = random.Random(seed)
    run = engine(max_rows=32, kv_tokens=100_000, max_wait_seconds=5.0, max_active_seconds=1.0)
    for name in [f"a{i}" for i in range(8)] + ["rare"]:
        run.scheduler.mark_ready(name)
    for number in range(3000):
        while run.waiting < 100:
            run.add(f"{number}-{len(run.tickets)}", "loud", (f"a{rng.randrange(8)}",), 10, 30)
        if number % 500 == 250:
            run.add(f"rare{number}", "loud", ("rare",), 10, 30)
        run.step()
    rare = [run.waits[f"rare{number}"] for number in range(250, 3000, 500)]
    assert max(rare) <= 5.0 + 1.0 + 31 * STEP_SECONDS + 2 * STEP_SECONDS, rare


def test_the_bare_base_is_never_held_up_by_the_active_set() -> None:
    run = engine(max_active_adapters=1, max_wait_seconds=1.0, max_active_seconds=0.5)
    for name in ("a", "b"):
        run.scheduler.mark_ready(name)
    run.add("a", adapters=("a",), new=200)
    run.step()
    for number in range(5):
        run.add(f"b{number}", adapters=("b",), new=20)
    for number in range(100):
        run.add(f"base{number}", prompt=5, new=3)
        run.step()
    assert all(run.waits[f"base{number}"] < STEP_SECONDS / 2 for number in range(100))
    assert "b0" not in run.waits
    run.drain()


def test_a_large_request_gets_its_memory_although_small_ones_never_stop() -> None:
    run = engine(kv_tokens=400, max_wait_seconds=2.0)
    for number in range(600):
        while run.waiting < 20:
            run.add(f"{number}-{len(run.tickets)}", "small", (), 5, 20)
        if number == 50:
            run.add("large", "small", ("a",), 300, 100)
            run.scheduler.mark_ready("a")
        run.step()
    assert run.waits["large"] <= 2.0 + 22 * STEP_SECONDS


def test_an_adapter_that_loads_is_in_nobodys_way_and_one_that_failed_names_its_requests() -> None:
    run = engine(max_active_adapters=1, max_rows=1, max_wait_seconds=0.1)
    run.add("slow1", adapters=("slow",))
    run.add("slow2", adapters=("slow",))
    run.scheduler.mark_ready("fast")
    for number in range(20):
        run.add(f"fast{number}", adapters=("fast",))
    run.drain()
    assert len(run.done) == 20 and run.scheduler.snapshot().loading == 2
    assert run.scheduler.mark_failed("slow") == ("slow1", "slow2")
    assert is_empty(run.scheduler)
    run.add("slow3", adapters=("slow",))
    assert run.step() is None
    run.scheduler.mark_ready("slow")
    run.drain()
    assert "slow3" in run.done


def test_an_adapter_taken_away_serves_its_rows_to_the_end_and_then_leaves_the_active_set() -> None:
    run = engine()
    run.scheduler.mark_ready("a")
    run.add("runs", adapters=("a",), new=5)
    run.step()
    run.add("waits", adapters=("a",))
    assert run.scheduler.mark_failed("a") == ("waits",)
    run.drain()
    assert run.done == ["runs"] and run.active == set() == set(run.scheduler.snapshot().active)


def test_a_cancelled_request_frees_everything_wherever_it_is() -> None:
    run = engine(prefill_tokens=8, max_rows=2)
    run.scheduler.mark_ready("a")
    run.add("decodes", adapters=("a",), prompt=5, new=50)
    run.step()
    run.add("reads", adapters=("a",), prompt=50)
    run.step()
    run.add("waits", adapters=("a",))
    seen = run.scheduler.snapshot()
    assert (seen.decoding, seen.prefilling, seen.waiting) == (1, 1, 1)
    assert [run.cancel(id) for id in ("waits", "reads", "decodes", "decodes", "never")] == [True, True, True, False, False]
    assert is_empty(run.scheduler)
    run.add("after", prompt=4000, new=96)
    run.drain()
    assert run.done == ["after"]


@pytest.mark.parametrize(
    ("ticket", "told"),
    [
        (Ticket("x", "t", (), 90, 11), "90 tokens of prompt and up to 11 of answer are 101; there is room for 100"),
        (Ticket("x", "t", ("a", "b", "c"), 1, 1), "3 adapters, of which 2 can be active"),
        (Ticket("x", "t", ("a", "a"), 1, 1), "named twice"),
        (Ticket("x", "t", (), 0, 1), "0 tokens of prompt"),
        (Ticket("x", "t", (), 5, 1, 5), "5 of 5 prompt tokens are cached"),
        (Ticket("there", "t", (), 1, 1), "another request of this id"),
    ],
)
def test_what_can_never_run_is_refused_and_not_queued(ticket: Ticket, told: str) -> None:
    for limits in (
        Limits(kv_tokens=100, max_active_adapters=2),
        Limits(kv_tokens=999, max_request_tokens=100, max_active_adapters=2),
    ):
        scheduler = Scheduler(limits)
        scheduler.add(Ticket("there", "t", (), 1, 1))
        with pytest.raises(RequestError, match=told):
            scheduler.add(ticket)
        assert scheduler.snapshot().waiting == 1


def test_a_full_queue_says_how_full_and_whose() -> None:
    scheduler = Scheduler(Limits(kv_tokens=100, max_queue=3, max_queue_per_tenant=2))
    for id in "ab":
        scheduler.add(Ticket(id, "loud", (), 1, 1))
    with pytest.raises(QueueFullError, match="tenant 'loud' is full: 2 requests wait, 2 may") as caught:
        scheduler.add(Ticket("c", "loud", (), 1, 1))
    assert (caught.value.waiting, caught.value.limit) == (2, 2) and isinstance(caught.value, LuthierError)
    scheduler.add(Ticket("c", "quiet", (), 1, 1))
    with pytest.raises(QueueFullError, match="the queue is full: 3 requests wait"):
        scheduler.add(Ticket("d", "quiet", (), 1, 1))
    assert scheduler.cancel("a")
    scheduler.add(Ticket("d", "quiet", (), 1, 1))


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="kv_tokens is missing"):
        Limits(max_rows=2)


@pytest.mark.parametrize("spread", ["one queue", "a tenant each", "an adapter each", "both"])
def test_a_step_does_not_touch_all_that_wait(spread: str) -> None:
    touched: dict[int, int] = {}
    for waiting in (100, 10_000):
        run = engine(max_rows=8, max_queue=20_000, max_active_adapters=4)
        for number in range(waiting):
            adapters = (f"a{number}",) if spread in ("an adapter each", "both") else ()
            for adapter in adapters:
                run.scheduler.mark_ready(adapter)
            run.add(f"r{number}", f"t{number}" if spread in ("a tenant each", "both") else "t", adapters)
        counted: Counter[str] = Counter()
        scheduler = run.scheduler

        def count(frame: object, event: str, argument: object, counted: Counter[str] = counted) -> None:
            counted[event] += 1

        for _ in range(30):
            sys.setprofile(count)
            step = scheduler.plan(run.now)
            sys.setprofile(None)
            assert step is not None
            run.check(step)
            run.run(step)
            run.now += STEP_SECONDS
        touched[waiting] = counted["call"] + counted["c_call"]
    assert touched[10_000] <= 1.3 * touched[100], touched
