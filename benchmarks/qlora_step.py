"""What does a base in 4 bits cost in time, and save in memory? One optimiser step over NF4, and the same over a dense base.

SmolLM2-135M, r=16 on all linear layers, dense batches of 4 x 512 tokens of real text, every position labelled, AdamW included.
`luthier` and `luthier_nf4` differ in how the base is stored; `peft_nf4` is PEFT over bitsandbytes' Linear4bit. Each contender
has a process of its own; the processes take turns, and a figure is the median over their steps. The floor of what 4 bits add is
reading every weight back twice, for the forward and for the backward pass: `reading`. The last line on stdout is one JSON
document. `--rounds 1 --steps 1 --rows 1 --length 32` is the tiny run of the tests.
"""

import argparse
import json
import time
from typing import Any

from one_step import (
    R,
    batches,
    dtype_of,
    give_b_values,
    luthier_worker,
    medians,
    peaks,
    step_parser,
    take_turns,
    time_steps,
)


def main() -> None:
    arguments = step_parser(__doc__, list(WORKERS), steps=3).parse_args()
    if arguments.worker:
        print(json.dumps(WORKERS[arguments.worker](arguments)))
        return
    results = take_turns({name: None for name in WORKERS if name in arguments.only}, arguments)
    print(json.dumps(summary(results)))


def summary(results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    seconds, cpu, peak = medians(results, "seconds"), medians(results, "cpu_seconds"), peaks(results)
    at_rest = {name: runs[0]["static_bytes"] for name, runs in results.items() if "static_bytes" in runs[0]}
    found: dict[str, Any] = {
        "dtype": next(iter(results.values()))[0]["dtype"],
        "seconds_per_step": seconds,
        "cpu_seconds_per_step": cpu,
        "peak_gib": {name: value / 2**30 for name, value in peak.items()},
        "static_mib": {name: value / 2**20 for name, value in at_rest.items()},
        "loss": {name: runs[0]["loss"] for name, runs in results.items() if "loss" in runs[0]},
        "bits_per_weight": {name: runs[0]["bits_per_weight"] for name, runs in results.items() if "bits_per_weight" in runs[0]},
    }
    if {"luthier", "luthier_nf4"} <= results.keys():
        found["step_vs_dense"] = seconds["luthier_nf4"] / seconds["luthier"]
        found["cpu_step_vs_dense"] = cpu["luthier_nf4"] / cpu["luthier"]
        found["static_vs_dense"] = at_rest["luthier_nf4"] / at_rest["luthier"]
        found["peak_vs_dense"] = peak["luthier_nf4"] / peak["luthier"]
    if {"peft_nf4", "luthier_nf4"} <= results.keys():
        found["vs_peft_nf4"] = seconds["peft_nf4"] / seconds["luthier_nf4"]
        found["cpu_vs_peft_nf4"] = cpu["peft_nf4"] / cpu["luthier_nf4"]
    return found


def peft_nf4_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time PEFT's step over a base that bitsandbytes has put into 4 bits."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    from luthier.models.fetch import pull

    disable_progress_bar()
    folder, dtype = pull(arguments.model), dtype_of(arguments)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=nf4, device_map="cpu")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    named = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    give_b_values(named)
    ids = batches(arguments, AutoTokenizer.from_pretrained(folder))

    def loss_of(batch: Any) -> Any:
        return model(input_ids=batch, labels=batch, use_cache=False).loss

    return time_steps(arguments, ids, [each for _, each in named], loss_of, [name for name, _ in named])


def reading_worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time reading all weights back twice, and nothing else."""
    from luthier.models.load import load_model
    from luthier.ops.packed import PackedTensor, dense

    model = load_model(arguments.model, dtype=str(dtype_of(arguments)).removeprefix("torch."), quantize="nf4").model
    weights = [weight for weight in model.parameters() if isinstance(weight, PackedTensor)]
    seconds, cpu_seconds = [], []
    for _ in range(arguments.steps + 1):
        began, cpu = time.perf_counter(), time.process_time()
        for weight in [*weights, *weights]:
            dense(weight)
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(time.process_time() - cpu)
    dtype = str(dtype_of(arguments)).removeprefix("torch.")
    return {"seconds": seconds[1:], "cpu_seconds": cpu_seconds[1:], "peak_bytes": 0, "dtype": dtype}


WORKERS = {
    "luthier": luthier_worker,
    "luthier_nf4": lambda arguments: luthier_worker(arguments, quantize="nf4"),
    "peft_nf4": peft_nf4_worker,
    "reading": reading_worker,
}


if __name__ == "__main__":
    main()
