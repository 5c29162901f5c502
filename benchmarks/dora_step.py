"""What does DoRA cost? One optimiser step of LoRA and of DoRA, with luthier and with PEFT.

The task, the rules and the workers are those of train_step.py: SmolLM2-135M, r=16 on all linear layers, a process
of its own for each contender, turns taken, medians. The last line on stdout is one JSON document; its ratios are of processor
time, which a shared machine disturbs less than the clock. `--rounds 1 --steps 1 --rows 1 --length 32` is the tests' tiny run.
"""

import functools
import json
from typing import Any

from one_step import luthier_worker, medians, peaks, peft_worker, step_parser, take_turns

WORKERS = {
    "luthier_lora": luthier_worker,
    "luthier_dora": functools.partial(luthier_worker, use_dora=True),
    "peft_lora": peft_worker,
    "peft_dora": functools.partial(peft_worker, use_dora=True),
}


def main() -> None:
    arguments = step_parser(__doc__, list(WORKERS), steps=2).parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return

    results = take_turns(dict.fromkeys(arguments.only), arguments)
    print(json.dumps(summary(results)))


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds, cpu, peak = medians(results, "seconds"), medians(results, "cpu_seconds"), peaks(results)
    pairs = {
        "dora_vs_lora": ("luthier_dora", "luthier_lora"),
        "peft_dora_vs_peft_lora": ("peft_dora", "peft_lora"),
        "peft_dora_vs_dora": ("peft_dora", "luthier_dora"),
        "peft_lora_vs_lora": ("peft_lora", "luthier_lora"),
    }
    known = {name: pair for name, pair in pairs.items() if set(pair) <= set(results)}
    return {
        "dtype": next(iter(results.values()))[0]["dtype"],
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": cpu,
        "peak_gib": {name: value / 2**30 for name, value in peak.items()},
        "loss": {name: runs[0]["loss"] for name, runs in results.items()},
        **{name: cpu[over] / cpu[under] for name, (over, under) in known.items()},
        "memory": {name: peak[over] / peak[under] for name, (over, under) in known.items()},
    }


if __name__ == "__main__":
    main()
