"""How long does one optimiser step take, and in how much memory? PEFT, PEFT with tcmalloc, and luthier, side by side.

SmolLM2-135M, r=16 on all linear layers, dense batches of 4 x 512 tokens of real text, every position labelled, AdamW included.
Each contender has a process of its own; the processes take turns, and a figure is the median over their steps. The floor is the
time of the matrix products that no LoRA step can do without: each frozen weight once forward and once for the gradient of
its input, in the dtype this machine multiplies fast. The last line on stdout is one JSON document.
`--rounds 1 --steps 1 --rows 1 --length 32` is the tiny run of the tests.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from one_step import dtype_of, luthier_worker, medians, peaks, peft_worker, run_worker, step_parser, take_turns

TCMALLOC = ("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4", "/usr/lib/aarch64-linux-gnu/libtcmalloc_minimal.so.4")


def main() -> None:
    arguments = step_parser(__doc__, [name for name in WORKERS if name != "gold"], steps=3).parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return

    contenders = {"floor": None, "peft": None, "peft_tcmalloc": tcmalloc(), "luthier": None, "luthier_compiled": None}
    if contenders["peft_tcmalloc"] is None:
        print("no tcmalloc here (Debian: apt-get install libtcmalloc-minimal4); leaving that contender out", file=sys.stderr)
        del contenders["peft_tcmalloc"]
    results = take_turns({name: preload for name, preload in contenders.items() if name in arguments.only}, arguments)
    print(json.dumps(summary(results, arguments)))


def tcmalloc() -> str | None:
    return next((path for path in TCMALLOC if Path(path).exists()), None)


def summary(results: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    tokens = arguments.rows * arguments.length
    seconds, cpu, peak = medians(results, "seconds"), medians(results, "cpu_seconds"), peaks(results)
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
    known = vars(arguments) | {"rows": min(2, arguments.rows), "length": min(128, arguments.length), "steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        return run_worker("gold", argparse.Namespace(**known), None, ("--gold", folder))


def gold_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Take the first step of all three in one process, since nothing is timed; luthier's last, which settles the allocator."""
    from safetensors.torch import load_file

    tensors = {}
    for name, worker, dtype in (
        ("peft", peft_worker, arguments.dtype),
        ("float64", peft_worker, "float64"),
        ("luthier", luthier_worker, arguments.dtype),
    ):
        file = Path(arguments.gold, f"{name}.safetensors")
        worker(argparse.Namespace(**vars(arguments) | {"dtype": dtype, "gold": str(file)}))
        tensors[name] = load_file(file)
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
    "gold": gold_worker,
}


if __name__ == "__main__":
    main()
