"""Everything at once: clients that ask and cancel while adapters come, go and are evicted, and no answer that is not its own."""

import random

from tests.engine_scene import ADAPTERS, in_threads, prompts_of, wait_until

from luthier.core.errors import AdapterStateError, QueueFullError
from luthier.engine import Limits, Sampling

NAMES = [None, *ADAPTERS]
PROMPTS = prompts_of([1, 5, 40, 70, 33, 64, 65, 12], seed=9)
LONGEST = 20


def test_each_answer_is_its_own_whatever_happens_around_it(scenes):
    scene = scenes()
    with scene.engine() as engine:
        alone = {
            (name, place): answer.token_ids
            for name in NAMES
            for place, answer in enumerate(engine.generate(PROMPTS, name, Sampling(max_new_tokens=LONGEST, ignore_eos=True)))
        }
        largest = max(each.bytes for each in engine.stats()["adapters"].adapters)
    limits = Limits(
        kv_tokens=500,
        max_rows=5,
        prefill_tokens=30,
        max_active_adapters=2,
        max_active_seconds=0.02,
        max_queue=40,
        max_queue_per_tenant=3,
    )
    ends = []

    def ask(dice, number):
        name, place, length = dice.choice(NAMES), dice.randrange(len(PROMPTS)), dice.randint(1, LONGEST)
        handle = engine.submit(
            PROMPTS[place],
            adapter=name,
            sampling=Sampling(max_new_tokens=length, ignore_eos=True),
            tenant=f"tenant {number % 3}",
        )
        if dice.random() < 0.2:
            handle.cancel()
        answer = handle.result(60)
        assert answer.finish_reason in ("length", "cancelled")
        made = length if answer.finish_reason == "length" else len(answer.token_ids)
        assert answer.token_ids == alone[name, place][:made]
        return answer.finish_reason

    def client(number):
        dice = random.Random(number)
        for _ in range(25):
            try:
                ends.append(ask(dice, number))
            except (AdapterStateError, QueueFullError) as error:  # no room beside what is in use, or just unloaded
                ends.append(type(error).__name__)

    def manager():
        dice = random.Random(99)
        for _ in range(25):
            name = dice.choice(NAMES[1:])
            done = engine.unload_adapter(name)
            if dice.random() < 0.5:
                done.result(60)
            engine.add_adapter(name, scene.folders[name])

    # So little memory that adapters go out again, and blocks of prompts are forgotten.
    with scene.engine(adapter_bytes=2 * largest, prefix_bytes=200_000, limits=limits) as engine:
        in_threads([manager, *(lambda number=number: client(number) for number in range(8))])
        assert ends.count("length") > 40 and "cancelled" in ends
        report = engine.stats()["adapters"]
        assert report.evictions > 0 and report.bytes_in_use == 0 and report.resident_bytes <= report.limit_bytes
        assert engine.stats()["cached_tokens"] > 0
        for name in NAMES[1:]:
            engine.unload_adapter(name).result(60)
        wait_until(lambda: engine.stats()["stacks_bytes"] == engine.stats()["kv_bytes"] == 0)
        assert engine.stats()["adapters"].adapters == () and engine.stats()["adapters"].resident_bytes == 0
