"""NF4: a weight as 4-bit codes of its values over the largest of each block, and that block's scale.

    w = NF4_VALUES[code] * scale        64 weights in a row share a scale; two codes a byte, the first in the upper half

Double quantisation stores the scales themselves as 8-bit codes: scale = dynamic_values[code] * nested_absmax + offset, where
256 scales in a row share a nested_absmax and offset is the mean of them all. 4 + 8/64 + 32/(64 * 256) = 4.127 bits a weight.
Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3. Codes, scales and values are bit for bit those of bitsandbytes 0.50.

Blocks run over the flattened weight, whatever its shape is. The last one may be shorter, and the last half byte unused.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core.errors import ConfigError, MissingExtraError, ShapeError
from luthier.quant.tables import dynamic_values, nf4_values

BLOCK = 64
SCALE_BLOCK = 256
SMALLEST = 1e-38
"""Stands in for the scale of a block of zeros, which would be divided by."""
GRID = 65535
"""An 8-bit code is looked up by its value rounded to one of 65,536 between -1 and 1, as bitsandbytes' CPU code does."""
CHUNK = 2**18
"""Weights read or coded at a time, in whole blocks: their float32 values stay in a core's cache."""

Impl = Literal["fast", "plain", "bitsandbytes"]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class NF4Weight:
    """A weight stored in 4 bits, `shape` and `dtype` being those it is read back in.

    `codes` are bytes (N, 1). `absmax` are the scales of the blocks: float32, or 8-bit codes where there is `nested_absmax`
    (float32, one for 256 of them) and `nested_offset` (float32, one number).
    """

    codes: Tensor
    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None
    block: int = BLOCK

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Field -> tensor, of those that there are."""
        fields = {name: getattr(self, name) for name in ("codes", "absmax", "nested_absmax", "nested_offset")}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    @property
    def num_bytes(self) -> int:
        """What the codes and scales take in memory. The tables are the same for all weights and not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.shape.numel()

    def scales(self) -> Tensor:
        """Return the scale of each block, in float32."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        values = _by_block(_dynamic(self.absmax.device)[self.absmax.int()], self.nested_absmax, SCALE_BLOCK)
        return values.add_(self.nested_offset)

    def to(self, device: torch.device, dtype: torch.dtype) -> "NF4Weight":
        """Return the same codes on another device, or to be read back in another dtype."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, dtype=dtype, **moved)

    def copied(self) -> "NF4Weight":
        """Return a copy with tensors of its own."""
        copies: dict[str, Any] = {name: tensor.clone() for name, tensor in self.tensors.items()}
        return replace(self, **copies)


def nf4_bytes(num_weights: int, *, double: bool = True) -> int:
    """Return what so many weights will take in 4 bits: `NF4Weight.num_bytes`, before there is one."""
    num_blocks = -(-num_weights // BLOCK)
    scales = num_blocks + 4 * -(-num_blocks // SCALE_BLOCK) + 4 if double else 4 * num_blocks
    return -(-num_weights // 2) + scales


def quantize_nf4(weight: Tensor, *, double: bool = True) -> NF4Weight:
    """Return `weight` (any shape) in 4 bits, with `double` quantisation or with float32 scales (4.5 bits).

    Quantising what was read back gives the same codes. Raises: ShapeError (no numbers), ConfigError (a dtype that is not
    float32, float16 or bfloat16; numbers that are not finite).
    """
    if weight.dtype not in FLOATS:
        raise ConfigError(f"only float32, float16 and bfloat16 weights can be put into 4 bits, not {weight.dtype}; cast it first")
    if not weight.numel():
        raise ShapeError(f"a weight of shape {tuple(weight.shape)} holds no numbers to put into 4 bits")
    flat = weight.detach().reshape(-1)
    parts = [_coded(part.float()) for part in flat.split(CHUNK)]  # a dense copy of a large weight would be the peak of loading
    if bad := sum(num_bad for _, _, num_bad in parts):
        raise ConfigError(
            f"{bad} of {weight.numel()} numbers of the weight are not finite, and each would spoil its whole block; "
            "load the weight again, or leave this layer out"
        )
    stored = NF4Weight(
        torch.cat([codes for codes, _, _ in parts]), torch.cat([absmax for _, absmax, _ in parts]), weight.shape, weight.dtype
    )
    return _with_coded_scales(stored) if double else stored


def _coded(values: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the codes (N, 1), the scales of the blocks, and how many of the flat float32 `values` are not finite."""
    absmax = _largest(values, BLOCK)
    full = values.numel() // BLOCK * BLOCK
    # bitsandbytes multiplies whole blocks by the reciprocal and divides the last, shorter one; it differs in the last bit.
    absmax[full // BLOCK :].clamp_(min=SMALLEST)
    scaled = torch.cat(
        [
            _by_block(values[:full], 1 / absmax[: full // BLOCK].clamp(min=SMALLEST), BLOCK),
            values[full:] / absmax[full // BLOCK :],
        ]
    )
    table = _nf4(values.device)
    scaled = F.pad(scaled.clamp_(-1, 1), (0, scaled.numel() % 2))
    codes = torch.bucketize(scaled, (table[:-1] + table[1:]) / 2, out_int32=True).to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1), absmax, int((~values.isfinite()).sum())


def dequantize_nf4_plain(stored: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """The plain expression that `dequantize_nf4` equals."""
    bytes_N = stored.codes.reshape(-1).int()
    codes = torch.stack([bytes_N >> 4, bytes_N & 15], dim=1).reshape(-1)[: stored.shape.numel()]
    values = _nf4(codes.device)[codes] * stored.scales().repeat_interleave(stored.block)[: codes.numel()]
    return values.to(dtype or stored.dtype).reshape(stored.shape)


def dequantize_nf4(
    stored: NF4Weight, dtype: torch.dtype | None = None, *, out: Tensor | None = None, impl: Impl = "fast"
) -> Tensor:
    """Return the weight in `dtype`, or in that of `stored`; written into `out` if there is one, which is contiguous.

    `impl` "fast" looks up two weights at a time, by their byte; "plain" is the plain expression; "bitsandbytes" calls its CPU
    kernel, two to four times as fast, where that can do it, and is "fast" elsewhere (an odd last axis, float64). The result
    is the same, bit for bit. Raises: MissingExtraError without bitsandbytes.
    """
    dtype = out.dtype if out is not None else dtype or stored.dtype
    if impl == "plain":
        values = dequantize_nf4_plain(stored, dtype)
        return values if out is None else out.copy_(values)
    if impl == "bitsandbytes" and _has_kernel(stored, dtype):
        kernel = _bitsandbytes().dequantize_4bit.default
        read: Tensor = kernel(stored.codes, stored.scales(), stored.block, "nf4", stored.shape, dtype).view(stored.shape)
        return read if out is None else out.copy_(read)
    out = torch.empty(stored.shape, dtype=dtype, device=stored.codes.device) if out is None else out
    _look_up(stored, out.view(-1))
    return out


def _look_up(stored: NF4Weight, out: Tensor) -> None:
    """Write the weights into `out` (flat), a chunk of whole blocks at a time."""
    bytes_N, scales, pairs = stored.codes.reshape(-1), stored.scales(), _nf4_pairs(out.device)
    step = min(max(1, CHUNK // stored.block) * stored.block // 2, bytes_N.numel())
    indices = torch.empty(step, dtype=torch.int32, device=out.device)
    found = torch.empty(step, dtype=torch.int64, device=out.device)
    for begin in range(0, bytes_N.numel(), step):
        part = bytes_N[begin : begin + step]
        index, found = indices[: len(part)].copy_(part), found[: len(part)]
        torch.index_select(pairs, 0, index, out=found)
        values = found.view(torch.float32)[: out.numel() - 2 * begin]
        first = 2 * begin // stored.block
        scaled = _by_block(values, scales[first : first - (-len(values) // stored.block)], stored.block, inplace=True)
        out[2 * begin : 2 * begin + len(values)].copy_(scaled)


def _by_block(values: Tensor, factors: Tensor, block: int, *, inplace: bool = False) -> Tensor:
    """Return flat `values` times the factor of each block, of which the last may be shorter."""
    scaled = values if inplace else values.clone()
    full = values.numel() // block
    scaled[: full * block].view(-1, block).mul_(factors[:full, None])
    scaled[full * block :].mul_(factors[full:])
    return scaled


def _largest(values: Tensor, block: int) -> Tensor:
    """Return the largest magnitude of each block of flat `values`."""
    full = values.numel() // block * block
    largest = values[:full].view(-1, block).abs().amax(dim=1)
    return torch.cat([largest, values[full:].abs().amax()[None]]) if full < values.numel() else largest


def _with_coded_scales(stored: NF4Weight) -> NF4Weight:
    offset = stored.absmax.mean()
    centred = stored.absmax - offset
    largest = _largest(centred, SCALE_BLOCK)
    scaled = _by_block(centred, 1 / largest, SCALE_BLOCK).nan_to_num_(-1.0)
    cell = ((scaled + 1) * (GRID / 2) + 0.5).clamp_(0, GRID).long()
    return replace(stored, absmax=_dynamic_cells(cell.device)[cell], nested_absmax=largest, nested_offset=offset)


@cache
def _nf4(device: torch.device) -> Tensor:
    return nf4_values(device)


@cache
def _dynamic(device: torch.device) -> Tensor:
    return dynamic_values(device)


@cache
def _nf4_pairs(device: torch.device) -> Tensor:
    """Byte -> the float32 values of both its codes, as one 64-bit number."""
    table = nf4_values()
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)
    return pairs.view(torch.int64).reshape(-1).to(device)


@cache
def _dynamic_cells(device: torch.device) -> Tensor:
    """Cell of the grid -> the 8-bit code nearest to its middle."""
    table = dynamic_values()
    middles = torch.arange(GRID + 1, dtype=torch.float32) * (2 / GRID) - 1
    return torch.bucketize(middles, (table[:-1] + table[1:]) / 2).to(torch.uint8).to(device)


def _has_kernel(stored: NF4Weight, dtype: torch.dtype) -> bool:
    return dtype in FLOATS and len(stored.shape) > 0 and stored.shape[-1] % 2 == 0 and stored.block < 2048


@cache
def _bitsandbytes() -> Any:
    try:
        import bitsandbytes  # noqa: F401  registers its operators
    except ImportError:
        raise MissingExtraError("bitsandbytes", "quant", "impl='bitsandbytes'") from None
    return torch.ops.bitsandbytes
