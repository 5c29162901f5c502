"""Does the memory of an adapter come back? One is loaded, used and unloaded, a thousand times over, in one engine.

SmolLM2-135M with r=16 on all linear layers: 20 MB for each adapter in memory, so that a thousand which stayed would be 20 GB.
A cycle is `add_adapter` under a name never used before, a request of a few tokens, and `unload_adapter` until it says that all is
given back. What the process has resident is told every --every cycles; the first --settle cycles are the start, for buffers that
stay by design. The last line on stdout is one JSON document, with `worst_vs_start` the largest figure after the start over that
of the start.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from serve import work_folder
from serving.work import add_work_flags, make_prompts, write_adapters


def main() -> None:
    arguments = read_arguments()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with work_folder(arguments.work) as folder:
        result = measure(arguments, folder)
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.set_defaults(tokens=2)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--settle", type=int, default=50, help="cycles after which memory is the start's")
    parser.add_argument("--every", type=int, default=50, help="cycles between two looks")
    parser.add_argument("--adapters", type=int, default=16, help="different ones, used in turn")
    parser.add_argument("--length", type=int, default=40, help="tokens of a prompt; some of it is kept as a beginning")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the cycles and return what was resident along the way."""
    import torch

    from luthier.engine import Engine
    from luthier.engine.requests import Sampling
    from luthier.models import pull
    from luthier.train.memory import held_memory, peak_memory

    torch.set_num_threads(arguments.threads)
    model = pull(arguments.model).resolve()
    names = [f"a{index}" for index in range(arguments.adapters)]
    places = list(write_adapters(folder / f"many_{arguments.dtype}", model, names, arguments.dtype).values())
    prompts, source = make_prompts(arguments, model, [arguments.length])
    sampling = Sampling(max_new_tokens=arguments.tokens, ignore_eos=True)
    held: dict[int, float] = {}
    with Engine.load(str(model), dtype=arguments.dtype) as engine:
        began, cpu = time.perf_counter(), time.process_time()
        for number in range(1, arguments.cycles + 1):
            name = f"cycle-{number}"
            engine.add_adapter(name, places[number % len(places)])
            done = engine.submit(prompts[0], adapter=name, sampling=sampling).result()
            assert len(done.token_ids) == arguments.tokens, done.error
            engine.unload_adapter(name).result()
            if number == arguments.settle or number % arguments.every == 0:
                held[number] = held_memory() / 2**20
                print(f"{number:5} cycles: {held[number]:8.1f} MiB resident", file=sys.stderr, flush=True)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        loads = engine.stats()["adapters"].loads
    start = held[arguments.settle]
    after = {number: mib for number, mib in held.items() if number > arguments.settle}
    return {
        "worst_vs_start": max(after.values()) / start,
        "last_vs_start": held[arguments.cycles] / start,
        "held_mib": {str(number): mib for number, mib in held.items()},
        "peak_mib": peak_memory() / 2**20,
        "cycles": arguments.cycles,
        "loads": loads,
        "seconds_per_cycle": seconds / arguments.cycles,
        "cpu_seconds_per_cycle": cpu / arguments.cycles,
        "prompts": source,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
    }


if __name__ == "__main__":
    main()
