"""Adapters come and go while the engine runs: nobody waits for ever, tenants get their share, and what is unloaded is gone."""

import gc
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.engine_scene import prompts_of, wait_until
from tests.served_adapters import cut_short, save_random_adapter
from torch import Tensor

from luthier.core.errors import AdapterFormatError, AdapterStateError
from luthier.engine import Engine
from luthier.engine.requests import Sampling
from luthier.engine.scheduler import Limits
from luthier.registry import schema
from luthier.registry.place import open_registry
from luthier.registry.registering import register

LONG = 300.0
"""Seconds after which a test gives up; nothing depends on its size."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folders(build_tiny, tmp_path_factory) -> Callable[[int], Path]:
    """Return a function that gives the folder of an adapter for the tiny Llama, one for each seed."""
    home = tmp_path_factory.mktemp("adapters")

    def folder_of(seed: int) -> Path:
        folder = home / f"a{seed}"
        if folder.exists():
            return folder
        return save_random_adapter(folder, build_tiny("llama"), seed, r=1 + seed % 5, target_modules=LINEARS)

    return folder_of


@pytest.fixture
def engine_of(build_tiny, byte_tokenizer):
    """Return a factory of engines for the tiny Llama; arguments are those of Limits, `adapters` and `prefix_bytes`."""
    made = []

    def make(adapters=None, prefix_bytes=0, **limits) -> Engine:
        settings = Limits(**({"kv_tokens": 4096} | limits))
        made.append(Engine(build_tiny("llama"), byte_tokenizer, adapters=adapters, limits=settings, prefix_bytes=prefix_bytes))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


def of(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, ignore_eos=True)


def active(engine: Engine) -> tuple[str, ...]:
    return engine.stats()["scheduler"].active


# --- fairness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flooding", [1, 7], ids=["with one adapter", "with seven"])
def test_a_flood_of_one_tenant_leaves_the_other_its_share(flooding: int, engine_of, folders) -> None:
    """Tokens are counted in the order they are made, from when the flood's first rows are done until either has none waiting."""
    quiet, flood, tokens, rows = 24, 96, 8, 4
    engine = engine_of({f"a{seed}": folders(seed) for seed in range(8)}, max_rows=rows, max_active_adapters=3)
    log: list[tuple[str, int]] = []
    (prompt,) = prompts_of([6])
    began = threading.Event()

    def send(tenant: str, number: int, adapter: str):
        def hear(event) -> None:
            began.set()
            log.extend((tenant, number) for _ in event.token_ids)

        return engine.submit(prompt, adapter=adapter, sampling=of(tokens), tenant=tenant, on_event=hear)

    handles = [send("flood", number, f"a{1 + number % flooding}") for number in range(flood)]
    assert began.wait(LONG)
    came = len(log)
    handles += [send("quiet", number, "a0") for number in range(quiet)]
    for handle in handles:
        assert len(handle.result(LONG).token_ids) == tokens
    running = {entry for entry in log[: came + rows] if entry[0] == "flood"}
    begin = max(place for place, entry in enumerate(log) if entry in running) + 1
    end = min(
        max(log.index((tenant, number)) for number in range(count)) for tenant, count in (("quiet", quiet), ("flood", flood))
    )
    shares = Counter(tenant for tenant, _ in log[begin:end])
    assert shares.total() > 10 * rows * tokens / 2, "they hardly waited at the same time: nothing was compared"
    # Admission is by whole requests, so the counters may be one request apart at both ends.
    assert shares["quiet"] >= shares.total() / 2 - 2 * tokens


def test_nobody_waits_for_ever_while_thirty_adapters_share_two_places(engine_of, folders) -> None:
    """Two tenants keep both places busy, without a pause and for as long as anybody else waits."""
    engine = engine_of(
        {f"a{seed}": folders(seed) for seed in range(32)},
        max_rows=4,
        max_active_adapters=2,
        max_wait_seconds=0.5,
        max_active_seconds=0.1,
    )
    (prompt,) = prompts_of([5])
    others_are_done = threading.Event()

    def keep_busy(adapter: str) -> int:
        turns = 0
        while not others_are_done.is_set():
            engine.submit(prompt, adapter=adapter, sampling=of(6), tenant=adapter).result(LONG)
            turns += 1
        return turns

    with ThreadPoolExecutor(6) as pool:
        busy = [pool.submit(keep_busy, f"a{number % 2}") for number in range(6)]
        try:
            wait_until(lambda: len(active(engine)) == 2)
            handles = [engine.submit(prompt, adapter=f"a{seed}", sampling=of(4), tenant="many") for seed in range(2, 32)]
            for handle in handles:
                assert len(handle.result(LONG).token_ids) == 4
        finally:
            others_are_done.set()
        assert all(each.result(LONG) > 1 for each in busy)  # and those two went on all the time


def test_more_adapters_than_there_is_memory_for_wait_for_room(build_tiny, byte_tokenizer, folders) -> None:
    """A queue of 20 adapters where three have room: those in it run and make way; only a mix, which holds some, is refused."""
    asked = {f"a{seed}": folders(seed) for seed in range(20)}
    (prompt,) = prompts_of([6])
    with Engine(build_tiny("llama"), byte_tokenizer, adapters=asked, limits=Limits(kv_tokens=4096)) as engine:
        wanted = [engine.submit(prompt, adapter=name, sampling=of(5)).result(LONG).token_ids for name in asked]
        largest = max(each.bytes for each in engine.stats()["adapters"].adapters)
    settings = Limits(kv_tokens=4096, max_active_adapters=2)
    with Engine(
        build_tiny("llama"), byte_tokenizer, adapters=asked, limits=settings, adapter_bytes=3 * largest, prefix_bytes=0
    ) as engine:
        handles = [engine.submit(prompt, adapter=name, sampling=of(5)) for name in asked for _ in range(2)]
        answers = [handle.result(LONG).token_ids for handle in handles]
        assert answers == [tokens for tokens in wanted for _ in range(2)]
        report = engine.stats()["adapters"]
        assert report.failures == 0 and report.resident_bytes <= 3 * largest and report.bytes_in_use == 0


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_an_unloaded_adapter_is_gone_when_it_is_said_to_be(engine_of, folders) -> None:
    engine = engine_of({"a": folders(1), "b": folders(2)}, prefix_bytes=2**24)
    (prompt,) = prompts_of([70])
    for name in ("a", "b"):
        engine.submit(prompt, adapter=name, sampling=of(2)).result(LONG)
    before = engine.stats()
    assert len(active(engine)) == 2 and before["prefix_bytes"] > 0 and before["stacks_bytes"] > 0
    engine.unload_adapter("a").result(LONG)
    assert len(active(engine)) == 1 and engine.stats()["prefix_bytes"] == before["prefix_bytes"] / 2
    assert engine.submit(prompt, adapter="b", sampling=of(1)).result(LONG).cached_tokens == 64
    engine.unload_adapter("b").result(LONG)
    after = engine.stats()
    assert (after["stacks_bytes"], after["prefix_bytes"], after["kv_bytes"]) == (0, 0, 0)
    assert (active(engine), after["adapters"].resident_bytes, after["adapters"].adapters) == ((), 0, ())
    with pytest.raises(AdapterStateError, match="there is no adapter 'a' here"):
        engine.submit(prompt, adapter="a", sampling=of(2))


def test_a_request_that_runs_is_answered_to_its_end(engine_of, folders) -> None:
    engine = engine_of({"a": folders(1)})
    (prompt,) = prompts_of([9])
    wanted = engine.submit(prompt, adapter="a", sampling=of(40)).result(LONG)
    may_go_on = threading.Event()
    handle = engine.submit(prompt, adapter="a", sampling=of(40), on_event=lambda _: may_go_on.wait(LONG) and None)
    try:
        gone = engine.unload_adapter("a")
        assert not gone.done()
        with pytest.raises(AdapterStateError, match="is being unloaded"):
            engine.submit(prompt, adapter="a", sampling=of(2))
    finally:
        may_go_on.set()
    assert handle.result(LONG) == wanted
    gone.result(LONG)
    assert active(engine) == ()


def test_a_name_given_anew_is_the_new_adapter_and_the_old_one_leaves(engine_of, folders) -> None:
    engine = engine_of({"a": folders(1), "same as new": folders(2)})
    (prompt,) = prompts_of([9])

    def ask(name: str) -> tuple[int, ...]:
        return engine.submit(prompt, adapter=name, sampling=of(12)).result(LONG).token_ids

    old, new = ask("a"), ask("same as new")
    assert old != new and len(active(engine)) == 2
    engine.add_adapter("a", folders(2))
    wait_until(lambda: len(active(engine)) == 1)
    assert ask("a") == new
    engine.unload_adapter("same as new").result(LONG)
    assert ask("a") == new and len(active(engine)) == 1  # the content has a name still


def test_a_closed_engine_leaves_nobody_waiting_for_an_adapter_to_go(engine_of, folders) -> None:
    engine = engine_of({f"a{seed}": folders(seed) for seed in range(4)})
    (prompt,) = prompts_of([9])
    handles = [engine.submit(prompt, adapter=f"a{seed}", sampling=of(60)) for seed in range(4)]
    gone = [engine.unload_adapter(f"a{seed}") for seed in range(4)]
    engine.close()
    for each in gone:
        each.result(LONG)
    assert {handle.result(LONG).finish_reason for handle in handles} <= {"cancelled", "length"}


def test_a_hundred_cycles_leave_nothing_behind(engine_of, folders) -> None:
    engine = engine_of(prefix_bytes=2**24)
    (prompt,) = prompts_of([70])

    def cycle(number: int) -> None:
        engine.add_adapter(f"tenant-{number}", folders(number % 3))
        engine.submit(prompt, adapter=f"tenant-{number}", sampling=of(2), tenant=f"t{number}").result(LONG)
        engine.unload_adapter(f"tenant-{number}").result(LONG)

    def alive() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        tensors = [each for each in objects if issubclass(type(each), Tensor)]
        return len(objects), len(tensors), sum(each.numel() * each.element_size() for each in tensors)

    for number in range(20):
        cycle(number)
    alive()  # the first look makes objects of its own: sizes of symbolic tensors, which tests of compiled code leave
    objects, tensors, num_bytes = alive()
    for number in range(20, 140):
        cycle(number)
    after = alive()
    assert after[1:] == (tensors, num_bytes)
    # What the scheduler remembers of tenants for max_wait_seconds; a few objects for each is no leak, one tensor would be.
    assert after[0] - objects < 120 * 25
    stats = engine.stats()
    assert (stats["stacks_bytes"], stats["prefix_bytes"], stats["kv_bytes"], stats["adapters"].resident_bytes) == (0, 0, 0, 0)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_adapter_that_cannot_be_read_fails_those_who_want_it_and_nobody_else(engine_of, folders, tmp_path) -> None:
    damaged = Path(shutil.copytree(folders(1), tmp_path / "damaged"))
    cut_short(damaged)
    engine = engine_of({"damaged": damaged, "a": folders(2), "b": folders(3)}, max_active_adapters=2)
    prompts = prompts_of([9] * 12)
    names = ["damaged", "a", "b", None] * 3
    handles = [engine.submit(prompt, adapter=name, sampling=of(8)) for prompt, name in zip(prompts, names, strict=True)]
    for handle, name in zip(handles, names, strict=True):
        if name == "damaged":
            with pytest.raises(AdapterFormatError, match="truncated, damaged or edited"):
                handle.result(LONG)
        else:
            assert len(handle.result(LONG).token_ids) == 8
    with pytest.raises(AdapterFormatError):
        engine.submit(prompts[0], adapter={"a": 0.5, "damaged": 0.5}, sampling=of(3)).result(LONG)
    assert len(engine.submit(prompts[0], adapter="a", sampling=of(3)).result(LONG).token_ids) == 3
    engine.unload_adapter("damaged").result(LONG)


def test_an_adapter_that_could_not_be_made_active_can_be_asked_for_again(engine_of, folders, monkeypatch) -> None:
    engine = engine_of({"a": folders(1), "b": folders(2)})
    (prompt,) = prompts_of([9])
    wanted = engine.submit(prompt, adapter="b", sampling=of(5)).result(LONG)
    stacks, activate = engine._host.runner.stacks, engine._host.runner.stacks.activate

    def fail_once(*arguments: object) -> None:
        monkeypatch.setattr(stacks, "activate", activate)
        raise MemoryError("no room for one more")

    monkeypatch.setattr(stacks, "activate", fail_once)
    with pytest.raises(MemoryError, match="no room for one more"):
        engine.submit(prompt, adapter="a", sampling=of(5)).result(LONG)
    assert len(engine.submit(prompt, adapter="a", sampling=of(5)).result(LONG).token_ids) == 5
    assert engine.submit(prompt, adapter="b", sampling=of(5)).result(LONG) == wanted
    engine.unload_adapter("a").result(LONG)
    assert len(active(engine)) == 1


# --- from a registry -------------------------------------------------------------------------------------------------


def test_adapters_of_a_registry_are_served_by_their_references(build_tiny, byte_tokenizer, folders, tmp_path) -> None:
    registry = open_registry(tmp_path / "registry", create=True)
    for seed in (1, 2):
        register(registry, folders(seed), name="orders", actor="ann", owner="team", no_data_reason="a test")
    with registry.database.writing() as session:
        session.add(schema.Alias(adapter_id=1, name="stable", version_id=1))
    (prompt,) = prompts_of([9])
    asked = {"one": "orders:1", "stable": "orders:stable", "two": "orders:2", "from its folder": folders(1)}
    with Engine(build_tiny("llama"), byte_tokenizer, adapters=asked, registry=registry) as engine:
        answers = engine.generate([prompt] * 4, list(asked), of(12))
        one, stable, two, plain = (answer.token_ids for answer in answers)
        assert one == stable == plain != two
        assert len(active(engine)) == 2
        engine.add_adapter("absent", "orders:7")
        with pytest.raises(ValueError, match="There is no orders:7"):
            engine.submit(prompt, adapter="absent", sampling=of(3)).result(LONG)
    registry.database.engine.dispose()
