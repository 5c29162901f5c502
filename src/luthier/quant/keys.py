"""A 4-bit weight as named tensors, in the form that bitsandbytes and transformers write and read.

weight                                  the codes, bytes (N, 1)
weight.absmax                           scales of the blocks, float32 or 8-bit codes
weight.quant_map                        the value of each 4-bit code
weight.nested_absmax                    with double quantisation: scales of the scales,
weight.nested_quant_map                 and the value of each 8-bit code
weight.quant_state.bitsandbytes__nf4    the rest, as JSON in bytes
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.quant.nf4 import SCALE_BLOCK, NF4Weight
from luthier.quant.tables import dynamic_values, nf4_values

STATE = "quant_state.bitsandbytes__nf4"


def to_keys(stored: NF4Weight) -> dict[str, Tensor]:
    """Return the tensors of a weight, "" being the codes and the others named as above, without "weight."."""
    tensors = {"": stored.codes, "absmax": stored.absmax, "quant_map": nf4_values(stored.codes.device)}
    state = {
        "quant_type": "nf4",
        "blocksize": stored.block,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    if stored.nested_absmax is not None and stored.nested_offset is not None:
        tensors["nested_absmax"] = stored.nested_absmax
        tensors["nested_quant_map"] = dynamic_values(stored.codes.device)
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": stored.nested_offset.item()}
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return tensors


def from_keys(tensors: Mapping[str, Tensor]) -> NF4Weight:
    """Return the weight that `to_keys`, or bitsandbytes, made these tensors of.

    Raises: ModelError with all that is missing, of another kind (fp4, other tables) or of a size that does not fit.
    """
    if missing := [key for key in ("", "absmax", "quant_map", STATE) if key not in tensors]:
        raise ModelError(
            f"not a weight in NF4: {', '.join(key or 'the codes' for key in missing)} not there, of {sorted(tensors)}"
        )
    codes, absmax = tensors[""], tensors["absmax"]
    try:
        state = json.loads(bytes(tensors[STATE].cpu().tolist()))
        shape, dtype, block = torch.Size(state["shape"]), getattr(torch, state["dtype"]), int(state["blocksize"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{STATE} of a weight in NF4 cannot be read: {error!r}") from None
    is_double = "nested_absmax" in tensors
    num_blocks, faults = -(-shape.numel() // block), []
    if codes.dtype != torch.uint8 or codes.numel() != -(-shape.numel() // 2):
        faults.append(f"{codes.numel()} codes of {codes.dtype} for {tuple(shape)}, not {-(-shape.numel() // 2)} bytes")
    if absmax.dtype != (torch.uint8 if is_double else torch.float32) or absmax.numel() != num_blocks:
        faults.append(f"absmax has {absmax.numel()} numbers of {absmax.dtype}, for {num_blocks} blocks of {block}")
    if not torch.equal(tensors["quant_map"].cpu().float(), nf4_values()):
        faults.append("quant_map is not NF4's")
    if is_double:
        nested, needed = tensors["nested_absmax"], -(-num_blocks // SCALE_BLOCK)
        if state.get("nested_blocksize") != SCALE_BLOCK or nested.numel() != needed or nested.dtype != torch.float32:
            faults.append(f"nested_absmax has {nested.numel()} numbers of {nested.dtype}, not {needed} of float32")
        if "nested_offset" not in state:
            faults.append("nested_offset is not there")
        if "nested_quant_map" not in tensors or not torch.equal(tensors["nested_quant_map"].cpu().float(), dynamic_values()):
            faults.append("nested_quant_map is not the usual one")
    if faults:
        raise ModelError("not a weight in NF4 as luthier reads it: " + "; ".join(faults))
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=codes.device) if is_double else None
    return NF4Weight(codes.reshape(-1, 1), absmax, shape, dtype, tensors.get("nested_absmax"), offset, block)
