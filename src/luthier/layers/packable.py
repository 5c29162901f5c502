"""Which linear layers of a model go into 4 bits, why others do not, and how a configuration says so."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from luthier.core.names import matches_name
from luthier.layers.kinds import why_not
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor
from luthier.quant.nf4 import Impl

OUTPUT_HEAD = ("lm_head",)
"""What is left out where nothing is named: this, and whatever else a model says is its output head."""

READERS = {
    "fast": "luthier's own code",
    "plain": "the plain expression",
    "bitsandbytes": "bitsandbytes' kernel (luthier's own code where that has none)",
}


@dataclass(frozen=True)
class Packing:
    """Paths of the layers that went into 4 bits, what they took and take, and why others were left out."""

    packed: tuple[str, ...]
    dense_bytes: int
    packed_bytes: int
    num_weights: int
    left_out: dict[str, str] = field(default_factory=dict)
    impl: Impl = "fast"
    """How their weights are read back (`dequantize_nf4`)."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.packed_bytes / max(1, self.num_weights)

    def __str__(self) -> str:
        lines = [
            f"{len(self.packed)} linear layers in 4 bits ({self.bits_per_weight:.2f} a weight): "
            f"{self.dense_bytes / 2**20:.1f} MiB -> {self.packed_bytes / 2**20:.1f} MiB, read back by {READERS[self.impl]}"
        ]
        return "\n".join(lines + [f"  left as it is: {path}: {reason}" for path, reason in self.left_out.items()])


def split_linears(model: nn.Module, skip: Sequence[str] = OUTPUT_HEAD) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return path -> layer of the linear layers that can go into 4 bits, and path -> reason of those that stay as they are.

    Left out are what `skip` names, subclasses with a forward of their own and weights that two modules share. The model may be
    on the meta device.
    """
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)() if tuple(skip) == OUTPUT_HEAD else None
    holders: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), []).append(path)
    chosen: dict[str, nn.Linear] = {}
    left_out: dict[str, str] = {}
    for path, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        others = [other for other in holders.get(id(module._parameters.get("weight")), []) if other != path]
        parent = modules[path.rpartition(".")[0]]
        reason = _why_dense(module, parent, path, skip, others) or ("the output head" if module is head else None)
        if reason is None:
            chosen[path] = module
        else:
            left_out[path] = reason
    return chosen, left_out


def packing_of(layers: Mapping[str, nn.Linear], left_out: dict[str, str]) -> Packing:
    """Return the report on layers that are in 4 bits now."""
    weights = [layer.weight for layer in layers.values()]
    packed_bytes = sum(weight.stored.num_bytes for weight in weights if isinstance(weight, PackedTensor))
    num_weights = sum(weight.numel() for weight in weights)
    dense_bytes = sum(w.numel() * w.itemsize for w in weights)
    impls = [weight.impl for weight in weights if isinstance(weight, PackedTensor)]
    return Packing(tuple(layers), dense_bytes, packed_bytes, num_weights, left_out, *impls[:1])


def declare_packed(model: nn.Module, left_out: Sequence[str], double: bool, dtype: torch.dtype) -> None:
    """Let the model's configuration say in transformers' words what is in 4 bits, where it has one."""
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "llm_int8_skip_modules": list(left_out),
        }


def _why_dense(module: nn.Linear, parent: nn.Module, path: str, skip: Sequence[str], others: list[str]) -> str | None:
    if any(matches_name(entry, path) for entry in skip):
        return "named in skip"
    if isinstance(module, PackedLinear):
        return "in 4 bits already"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, which may use its weight in another way"
    if others:
        return f"shares its weight with {' and '.join(others)}"
    return why_not(module, parent)
