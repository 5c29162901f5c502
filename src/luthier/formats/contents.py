"""What is in an adapter folder, in numbers and words, without its base."""

from typing import Any

from luthier.core.spectrum import factored_norm
from luthier.formats.card import method_of, named_targets, named_whole
from luthier.formats.folder import AdapterFolder
from luthier.formats.pairs import stored_pairs


def describe_adapter(folder: AdapterFolder) -> dict[str, Any]:
    """Return what `luthier inspect` shows: plain values, ready for JSON.

    The norm of each layer's update is that of scaling * B A (Frobenius). Experts are told one by one; which parameter a pair of
    theirs is for, the base would have to tell, so where patterns give those of one module different ranks, they are left out.
    """
    config, note = folder.config, folder.note
    base = note.get("base") or {}
    recipe = note.get("recipe") or {}
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in folder.tensors.values()})
    return {
        "folder": str(folder.path),
        "base": config.base_model_name_or_path,
        "fingerprint": (base.get("sample_digest") or "")[:16] or None,
        "method": method_of(config),
        "targets": named_targets(config),
        "besides": named_whole(config),
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


def _layers(folder: AdapterFolder) -> list[dict[str, Any]]:
    layers = []
    for pair in stored_pairs(folder):
        A, B = pair.matrices()
        layers.append(
            {
                "path": pair.path,
                "r": pair.r,
                "scaling": pair.scaling,
                "delta_norm": factored_norm(A, B, pair.scaling),
                "A_norm": float(pair.lora_A.double().norm()),
                "B_norm": float(pair.lora_B.double().norm()),
            }
        )
    return layers
