"""What is in an adapter folder, in numbers and words, without its base."""

from typing import Any

from luthier.core.adalora import adalora_scaling
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.lora import lora_scaling
from luthier.core.names import pattern_value
from luthier.formats.folder import AdapterFolder
from luthier.formats.keys import PREFIX, canonical_keys


def describe_adapter(folder: AdapterFolder) -> dict[str, Any]:
    """Return what `luthier inspect` shows: plain values, ready for JSON.

    The norm of each layer's update is that of scaling * B A (Frobenius), from r x r products: |BA|^2 = tr(A A^T B^T B).
    """
    config, note = folder.config, folder.note
    base = note.get("base") or {}
    recipe = note.get("recipe") or {}
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(sorted(config.target_modules))
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in folder.tensors.values()})
    return {
        "folder": str(folder.path),
        "base": config.base_model_name_or_path,
        "fingerprint": (base.get("sample_digest") or "")[:16] or None,
        "method": _method(config),
        "targets": targets,
        "parameters": f"{folder.num_parameters:,}",
        "num_parameters": folder.num_parameters,
        "size": f"{folder.num_bytes / 1e6:.2f} MB",
        "bytes": folder.num_bytes,
        "tensors": f"{len(folder.tensors)} in {', '.join(dtypes)}",
        "trained by": f"luthier {note['luthier']}" if "luthier" in note else "",
        "metrics": note.get("metrics") or {},
        "recipe": {key: recipe[key] for key in ("step", "data", "train", "converted") if key in recipe},
        "config": config.model_dump(mode="json"),
        "layers": _layers(folder),
    }


def _method(config: LoraConfig) -> str:
    if isinstance(config, AdaLoraConfig):
        return f"AdaLoRA, r={config.init_r} to {config.target_r} on average, alpha={config.lora_alpha:g}"
    method = "DoRA" if config.use_dora else "LoRA"
    return f"{method}, r={config.r}, alpha={config.lora_alpha:g}{', rsLoRA' if config.use_rslora else ''}"


def _layers(folder: AdapterFolder) -> list[dict[str, Any]]:
    tensors = {key: folder.tensors[found] for found, key in canonical_keys(folder.tensors).items()}
    layers = []
    for key, lora_A in tensors.items():
        for a_suffix, b_suffix in (
            (".lora_A.weight", ".lora_B.weight"),
            (".lora_embedding_A", ".lora_embedding_B"),
            (".lora_A", ".lora_B"),
        ):
            lora_B = tensors.get(key.removesuffix(a_suffix) + b_suffix)
            if not key.endswith(a_suffix) or lora_B is None:
                continue
            path = key.removesuffix(a_suffix).removeprefix(PREFIX)
            A, B = lora_A.double(), lora_B.double()
            if isinstance(folder.config, AdaLoraConfig):
                scaling = adalora_scaling(folder.config.init_r, folder.config.lora_alpha)
            else:
                alpha = pattern_value(folder.config.alpha_pattern, path, folder.config.lora_alpha)
                scaling = lora_scaling(len(A), alpha, folder.config.use_rslora)
            lora_E = tensors.get(f"{PREFIX}{path}.lora_E")
            EA = A if lora_E is None else A * lora_E.double()
            squared = float(((EA @ EA.T) * (B.T @ B)).sum())
            layers.append(
                {
                    "path": path,
                    "r": len(A),
                    "scaling": scaling,
                    "delta_norm": scaling * max(0.0, squared) ** 0.5,
                    "A_norm": float(A.norm()),
                    "B_norm": float(B.norm()),
                }
            )
    return layers
