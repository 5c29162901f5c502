"""Adapter folders for the registry's tests: PEFT folders of a few kilobytes, written without torch and told apart by a seed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")


def save_adapter_folder(
    folder: Path, seed: int = 0, *, r: int = 4, base: dict[str, Any] | None = None, width: int = 12, **note: Any
) -> Path:
    """Write an adapter of random numbers; `base` is the fingerprint in its luthier.json, `note` what else stands there.

    Without `base` and `note` there is no luthier.json: a folder as PEFT writes it.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in LAYERS:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = random.normal(size=(r, width)).astype(np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = random.normal(size=(width + 1, r)).astype(np.float32)
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": ["down_proj", "q_proj"]}
    config |= {"base_model_name_or_path": "tiny-base", "task_type": "CAUSAL_LM"}
    files = {
        "adapter_model.safetensors": save(tensors, {"format": "pt"}),
        "adapter_config.json": json.dumps(config, indent=2).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    if base or note:
        told = {"format": 1, "luthier": "0.1.0", "files": {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}}
        told |= {"base": base or {}, "recipe": {}, "metrics": {}} | note
        (folder / "luthier.json").write_text(json.dumps(told, indent=2, sort_keys=True))
    return folder


def base_fingerprint(seed: int = 0) -> dict[str, Any]:
    """Return a fingerprint as luthier.json holds one, of a base model with one norm and one matrix."""

    def digest(word: str) -> str:
        return hashlib.sha256(f"{word} {seed}".encode()).hexdigest()

    return {
        "scheme": "luthier-base-2",
        "arch": {"model_type": "llama"},
        "arch_digest": hashlib.sha256(b"llama").hexdigest(),
        "anchor_digest": digest("anchor"),
        "embedding_digest": digest("embedding"),
        "sample_digest": digest("sample"),
        "quantisation": None,
        "anchors": {"model.norm.weight": digest("norm")[:16]},
        "matrices": {"model.layers.0.mlp.down_proj.weight": digest("matrix")[:16]},
        "sketch": {},
    }
