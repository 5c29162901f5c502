"""The number format a base model is loaded in, chosen by what the processor multiplies fast, with the reason in words.

bfloat16 halves memory everywhere, but a processor without bf16 matrix products emulates them (`luthier.ops.products` goes around
that where a model is fused); there float32 is the safe and the more exact choice. This file never loads or converts a model.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.processor import fast_bf16_unit

if TYPE_CHECKING:
    import torch

NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


@dataclass(frozen=True)
class DtypeChoice:
    """A torch dtype and the sentence that says why it was taken; the sentence is meant to be printed."""

    dtype: "torch.dtype"
    reason: str


def choose_dtype(requested: str = "auto", device: str = "cpu") -> DtypeChoice:
    """Return the dtype to load a base model in.

    Raises: ConfigError if `requested` is no dtype a model can be loaded in.
    """
    import torch

    wanted = requested.lower().removeprefix("torch.")
    if wanted in NAMES:
        name = NAMES[wanted]
        return DtypeChoice(getattr(torch, name), f"{name}, as requested.")
    if wanted != "auto":
        raise ConfigError(
            f"dtype {requested!r} is unknown.{did_you_mean(wanted, NAMES)} Write auto, {', '.join(sorted(set(NAMES.values())))}."
        )
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.bfloat16, "bfloat16: this GPU multiplies it at full speed.")
        return DtypeChoice(torch.float32, "float32: this GPU has no bf16 units, and float16 overflows in training.")
    unit = fast_bf16_unit()
    if unit is not None:
        return DtypeChoice(torch.bfloat16, f"bfloat16: this processor multiplies it in hardware ({unit}).")
    return DtypeChoice(
        torch.float32,
        "float32: this processor has no bf16 matrix products. bfloat16 would halve the memory and round more; fused models train "
        "in it about as fast, others far slower.",
    )
