"""What is in an adapter folder, in numbers and words, without its base."""

from typing import Any

from luthier.core.adalora import adalora_scaling
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.lora import expert_factors, lora_scaling
from luthier.core.names import pattern_value
from luthier.formats.card import named_targets
from luthier.formats.folder import AdapterFolder
from luthier.formats.keys import PREFIX, canonical_keys, parameter_sizes


def describe_adapter(folder: AdapterFolder) -> dict[str, Any]:
    """Return what `luthier inspect` shows: plain values, ready for JSON.

    The norm of each layer's update is that of scaling * B A (Frobenius), from r x r products: |BA|^2 = tr(A A^T B^T B). The
    updates of a parameter's experts are taken together; which parameter a pair is for, the base would have to tell, so where the
    patterns give those of one module different ranks, their pairs are left out.
    """
    config, note = folder.config, folder.note
    base = note.get("base") or {}
    recipe = note.get("recipe") or {}
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in folder.tensors.values()})
    return {
        "folder": str(folder.path),
        "base": config.base_model_name_or_path,
        "fingerprint": (base.get("sample_digest") or "")[:16] or None,
        "method": _method(config),
        "targets": named_targets(config),
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
            r, num_experts = len(A), 1
            if isinstance(folder.config, AdaLoraConfig):
                scaling = adalora_scaling(folder.config.init_r, folder.config.lora_alpha)
            elif sizes := parameter_sizes(folder.config, path):
                r, alpha = sizes.pop()
                num_experts, rest = divmod(len(A), r)
                if sizes or rest:
                    continue
                scaling = lora_scaling(r, alpha, folder.config.use_rslora)
            else:
                alpha = pattern_value(folder.config.alpha_pattern, path, folder.config.lora_alpha)
                scaling = lora_scaling(r, alpha, folder.config.use_rslora)
            lora_E = tensors.get(f"{PREFIX}{path}.lora_E")
            EA = A if lora_E is None else A * lora_E.double()
            left, right = expert_factors(EA, B, num_experts)
            squared = float(((right @ right.mT) * (left.mT @ left)).sum())
            layers.append(
                {
                    "path": path,
                    "r": r,
                    "scaling": scaling,
                    "delta_norm": scaling * max(0.0, squared) ** 0.5,
                    "A_norm": float(A.norm()),
                    "B_norm": float(B.norm()),
                }
            )
    return layers
