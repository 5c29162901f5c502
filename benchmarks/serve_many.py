"""What do many adapters and many tenants cost? 500 adapters on disk, 32 clients, and one process that may hold 4 GiB.

Three questions. How fast is traffic over 500 adapters (Zipf, exponent 1) beside the same clients over 8? How late is the first
token where the adapter must come from disk (its files dropped from the page cache before), beside a warm one? And does a tenant
that floods the engine leave another its share of tokens while both wait?

The engine runs in a process of its own whose writable memory is limited by the kernel (RLIMIT_DATA: heap and private writable
maps; RLIMIT_AS would count files that are only mapped); the most it had resident is told beside. Clients are threads in it that
ask again as soon as they are answered. Seconds of a core are told beside seconds, since other jobs on a machine change the ones
but not the others. The last line on stdout is one JSON document.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve import percentile, work_folder
from serving.work import add_work_flags, make_prompts, write_adapters

KV_TOKENS = 16_384
"""Of all running requests; 32 clients need a quarter of it."""

COLD = 8
"""Adapters that no client asks for, kept for the question about the first token."""


@dataclass(frozen=True)
class Answered:
    """When a request was sent, its first token came and its last, by one clock."""

    sent: float
    first: float
    last: float
    tokens: int

    def within(self, begin: float, end: float) -> float:
        """Return how many of its tokens fell between two moments; between its first and its last they come evenly."""
        if self.last <= self.first:
            return self.tokens * (begin <= self.last <= end)
        return self.tokens * max(0.0, min(end, self.last) - max(begin, self.first)) / (self.last - self.first)


def main() -> None:
    arguments = read_arguments()
    if arguments.worker:
        limit = int(arguments.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        print(json.dumps(run(arguments, json.loads((arguments.worker / "many.json").read_text()))))
        return
    with work_folder(arguments.work) as folder:
        prepare(arguments, folder)
        settings = {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, *sys.argv, "--worker", str(folder)]
        done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    line = done.stdout.splitlines()[-1]
    print(line)
    if arguments.out:
        arguments.out.write_text(line + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.add_argument("--adapters", type=int, default=500)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="requests of each client in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--store-gib", type=float, default=0.7, help="of it for adapters in memory")
    parser.add_argument("--active", type=int, default=32, help="adapters in one step: a place for each row")
    parser.add_argument("--tiny", action="store_true", help="one round of very little")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.adapters, arguments.clients, arguments.requests, arguments.rounds, arguments.tokens = 12, 4, 2, 1, 4
    return arguments


def prepare(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the adapters and what the process needs to know."""
    from luthier.models import pull

    model = pull(arguments.model).resolve()
    chance = random.Random(0)
    prompts, source = make_prompts(arguments, model, [chance.randint(30, 60) for _ in range(arguments.clients)])
    names = [f"a{index}" for index in range(arguments.adapters)] + [f"cold{index}" for index in range(COLD)]
    adapters = write_adapters(folder / f"many_{arguments.dtype}", model, names, arguments.dtype)
    plan = {"model": str(model), "adapters": adapters, "prompts": prompts, "source": source}
    (folder / "many.json").write_text(json.dumps(plan))


def run(arguments: argparse.Namespace, plan: dict[str, Any]) -> dict[str, Any]:
    """Load the engine and ask all three questions."""
    import torch

    from luthier.engine import Engine
    from luthier.engine.scheduler import Limits
    from luthier.train.memory import held_memory, peak_memory

    torch.set_num_threads(arguments.threads)
    threading.stack_size(2**20)  # the limit counts what is reserved too, and clients are not what it is for
    began = time.perf_counter()
    engine = Engine.load(
        plan["model"],
        dtype=arguments.dtype,
        adapters=plan["adapters"],
        limits=Limits(kv_tokens=KV_TOKENS, max_active_adapters=arguments.active),
        prefix_cache=False,
        adapter_bytes=int(arguments.store_gib * 2**30),
    )
    load_seconds = time.perf_counter() - began
    names = [name for name in plan["adapters"] if not name.startswith("cold")]
    rates: dict[str, list[float]] = {"eight": [], "many": []}
    by_cpu: dict[str, list[float]] = {"eight": [], "many": []}
    firsts: dict[str, list[float]] = {"eight": [], "many": []}
    loads, steps = dict.fromkeys(rates, 0), dict.fromkeys(rates, 0)
    for name in names[:8]:  # which are warm from here on
        answer(engine, plan["prompts"][0], name, 1)()
    closed_loop(engine, arguments, plan, lambda chance: names[chance.randrange(8)], seed=0)
    for turn in range(arguments.rounds):
        for case, draw in {"eight": lambda chance: names[chance.randrange(8)], "many": zipf(names)}.items():
            before, cpu = engine.stats(), time.process_time()
            seconds, answered = closed_loop(engine, arguments, plan, draw, seed=1 + turn)
            tokens, after = sum(each.tokens for each in answered), engine.stats()
            rates[case].append(tokens / seconds)
            by_cpu[case].append(tokens / (time.process_time() - cpu))
            firsts[case] += [each.first - each.sent for each in answered]
            loads[case] += after["adapters"].loads - before["adapters"].loads
            steps[case] += after["steps"] - before["steps"]
            told = f"{rates[case][-1]:.1f} tokens/s, {by_cpu[case][-1]:.1f} in a second of a core"
            print(f"round {turn + 1}, {case}: {told}", file=sys.stderr, flush=True)
    requests = arguments.rounds * arguments.clients * arguments.requests
    found = {
        "many_vs_eight": median_ratio(rates["many"], rates["eight"]),
        "many_vs_eight_by_cpu": median_ratio(by_cpu["many"], by_cpu["eight"]),
        "tokens_per_s": {case: statistics.median(values) for case, values in rates.items()},
        "tokens_per_cpu_s": {case: statistics.median(values) for case, values in by_cpu.items()},
        "tokens_per_step": {case: requests * arguments.tokens / count for case, count in steps.items()},
        "loads_per_request": {case: count / requests for case, count in loads.items()},
        "first_token_p50_s": {case: percentile(values, 0.5) for case, values in firsts.items()},
        "first_token_p95_s": {case: percentile(values, 0.95) for case, values in firsts.items()},
        "cold": first_tokens(engine, plan),
        "tenants": flood(engine, arguments, plan, names),
        "adapters": len(names),
        "active_adapters": engine.limits.max_active_adapters,
        "adapter_gib_on_disk": sum(size_on_disk(Path(plan["adapters"][name])) for name in names) / 2**30,
        "load_seconds": load_seconds,
        "limit_gib": arguments.limit_gib,
        "held_gib": held_memory() / 2**30,
        "peak_gib": peak_memory() / 2**30,
        "prompts": plan["source"],
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    engine.close()
    return found


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio inside a round."""
    return statistics.median(our / their for our, their in zip(ours, theirs, strict=True))


def zipf(names: Sequence[str]) -> Callable[[random.Random], str]:
    """Return a draw in which the n-th name is n times rarer than the first."""
    weights = [1 / rank for rank in range(1, len(names) + 1)]
    return lambda chance: chance.choices(names, weights)[0]


def closed_loop(
    engine: Any, arguments: argparse.Namespace, plan: dict[str, Any], draw: Callable[[random.Random], str], *, seed: int
) -> tuple[float, list[Answered]]:
    """Let every client ask for its requests one after the other; return the seconds of all together, and the answers."""

    def client(index: int) -> list[Answered]:
        chance = random.Random(1000 * seed + index)
        prompt = plan["prompts"][index]
        return [answer(engine, prompt, draw(chance), arguments.tokens)() for _ in range(arguments.requests)]

    began = time.perf_counter()
    with ThreadPoolExecutor(arguments.clients) as pool:
        answered = [each for found in pool.map(client, range(arguments.clients)) for each in found]
    return time.perf_counter() - began, answered


def answer(engine: Any, prompt: list[int], adapter: str, tokens: int, tenant: str = "default") -> Callable[[], Answered]:
    """Send a request; return what waits for its answer."""
    from luthier.engine.requests import Sampling

    sent = time.perf_counter()
    handle = engine.submit(prompt, adapter=adapter, sampling=Sampling(max_new_tokens=tokens, ignore_eos=True), tenant=tenant)

    def wait() -> Answered:
        done = handle.result()
        assert done.finish_reason == "length", done.error
        return Answered(sent, sent + done.first_token_seconds, sent + done.seconds, len(done.token_ids))

    return wait


def first_tokens(engine: Any, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds to the first token of an idle engine, of adapters never asked for and again right after."""
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for name, folder in plan["adapters"].items():
        if name.startswith("cold"):
            drop_from_page_cache(Path(folder))
            for case in ("cold", "warm"):
                done = answer(engine, plan["prompts"][0], name, 1)()
                found[case].append(done.first - done.sent)
    return {f"{case}_p50_s": percentile(values, 0.5) for case, values in found.items()} | {
        f"{case}_worst_s": max(values) for case, values in found.items()
    }


def size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def drop_from_page_cache(folder: Path) -> None:
    """Have the next reader of these files wait for the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def flood(engine: Any, arguments: argparse.Namespace, plan: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return how a tenant fares whose 2 requests a row come after another's 6 a row, beside the same requests alone."""
    tokens, rows = max(2, arguments.tokens // 2), arguments.clients

    def send(tenant: str, adapter: str, count: int) -> list[Callable[[], Answered]]:
        return [answer(engine, plan["prompts"][i % len(plan["prompts"])], adapter, tokens, tenant) for i in range(count)]

    alone = [wait() for wait in send("quiet", names[1], 2 * rows)]
    waiting = send("flood", names[0], 6 * rows)
    waiting[0]()  # the flood fills every row before the other comes
    late = send("quiet", names[1], 2 * rows)
    quiet, flooded = [wait() for wait in late], [wait() for wait in waiting]
    return {
        "quiet_share_of_tokens": share(quiet, flooded),
        "fair_share": 0.5,
        "quiet_seconds_alone": span(alone),
        "quiet_seconds_beside_flood": span(quiet),
        "quiet_seconds_if_first_come_first_served": max(each.last for each in [*quiet, *flooded]) - quiet[0].sent,
    }


def share(ours: Sequence[Answered], theirs: Sequence[Answered]) -> float:
    """Return our part of the tokens made while both had requests waiting.

    From when the rows that they held as we came were free again (nothing that runs is taken away) until either's last began.
    """
    came = min(each.sent for each in ours)
    begin = max([came, *(each.last for each in theirs if each.first <= came)])
    end = min(max(each.first for each in side) for side in (ours, theirs))
    mine, other = (sum(each.within(begin, end) for each in side) for side in (ours, theirs))
    assert mine + other > 0, "the tenants never waited at the same time; give more --tokens or --clients"
    return mine / (mine + other)


def span(answered: Sequence[Answered]) -> float:
    return max(each.last for each in answered) - min(each.sent for each in answered)


if __name__ == "__main__":
    main()
