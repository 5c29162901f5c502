"""Attention of one step: each row looks at the keys and values of its own slot, and at no other's.

Decoding rows of one slab are one batched product over the slab; the tokens of a prompt are one causal attention per request.

Shapes: T rows, H heads, G groups (KV heads), D head width, S slots, C tokens looked at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.engine.kv import Slab, Slot
from luthier.engine.layouts import Block


@dataclass(frozen=True)
class Chunk:
    """Rows [row, row + tokens) of the step are the next tokens of a prompt, behind `slot.length` tokens that are there."""

    slot: Slot
    row: int
    tokens: int


@dataclass
class _Decoding:
    """The rows of the step that decode in one slab."""

    slab: Slab
    slots: list[Slot]
    rows: slice | Tensor
    index: Tensor
    positions: Tensor
    used: int
    is_all: bool
    masks: dict[int | None, Tensor] = field(default_factory=dict)


class StepAttention:
    """Where the rows of a step read and write: first a row for each slot of `decoding`, then the chunks."""

    def __init__(self, decoding: Sequence[Slot], chunks: Sequence[Chunk], device: torch.device):
        self.chunks = chunks
        self.device = device
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._groups: list[_Decoding] = []
        by_slab: dict[int, list[int]] = {}
        for row, slot in enumerate(decoding):
            by_slab.setdefault(slot.slab.capacity, []).append(row)
        for rows in by_slab.values():
            slots = [decoding[row] for row in rows]
            used = len(slots[0].slab.slots)
            is_run = rows == list(range(rows[0], rows[-1] + 1))
            group = _Decoding(
                slots[0].slab,
                slots,
                slice(rows[0], rows[-1] + 1) if is_run else torch.tensor(rows, device=device),
                torch.tensor([slot.index for slot in slots], device=device),
                torch.tensor([slot.length for slot in slots], device=device),
                used,
                [slot.index for slot in slots] == list(range(used)),
            )
            self._groups.append(group)

    def attend(self, layer: int, block: Block, q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
        """Write the rows' keys and values, and return what each row sees, (T, H D)."""
        out_THD = torch.empty_like(q_THD, memory_format=torch.contiguous_format)
        for group in self._groups:
            group.slab.keys[layer][group.index, :, group.positions] = k_TGD[group.rows]
            group.slab.values[layer][group.index, :, group.positions] = v_TGD[group.rows]
            out_THD[group.rows] = self._decode(layer, block, group, q_THD[group.rows])
        for chunk in self.chunks:
            rows = slice(chunk.row, chunk.row + chunk.tokens)
            start, stop = chunk.slot.length, chunk.slot.length + chunk.tokens
            keys = chunk.slot.slab.keys[layer, chunk.slot.index]
            values = chunk.slot.slab.values[layer, chunk.slot.index]
            keys[:, start:stop] = k_TGD[rows].transpose(0, 1)
            values[:, start:stop] = v_TGD[rows].transpose(0, 1)
            out_THD[rows] = self._prefill(block, chunk, q_THD[rows], keys[:, :stop], values[:, :stop])
        return out_THD.flatten(1)

    def _decode(self, layer: int, block: Block, group: _Decoding, q_BHD: Tensor) -> Tensor:
        mask_S1C = self._decode_mask(group, block.window)
        length = mask_S1C.shape[-1]
        groups, width = block.kv_heads, block.head_dim
        if not group.is_all:  # slots that are still being filled are computed too, for nothing, rather than gathered
            rows = q_BHD.new_zeros(group.used, block.heads, width)
            rows[group.index] = q_BHD
        else:
            rows = q_BHD
        q_NRD = rows.reshape(group.used * groups, block.heads // groups, width)
        keys_NCD = group.slab.keys[layer, : group.used, :, :length].reshape(-1, length, width)
        values_NCD = group.slab.values[layer, : group.used, :, :length].reshape(-1, length, width)
        if block.softcap is None:
            weights = torch.baddbmm(mask_S1C, q_NRD, keys_NCD.transpose(1, 2), alpha=block.scale)
        else:
            weights = _capped(torch.bmm(q_NRD, keys_NCD.transpose(1, 2)) * block.scale, block.softcap) + mask_S1C
        seen = torch.bmm(weights.softmax(-1), values_NCD).view(group.used, block.heads, width)
        return seen if group.is_all else seen[group.index]

    def _decode_mask(self, group: _Decoding, window: int | None) -> Tensor:
        """0 where a row of a slot may look, -inf elsewhere; (slots x KV heads, 1, C). The same for all layers of one window."""
        if window not in group.masks:
            lengths = [slot.length for slot in group.slab.slots[: group.used]]
            decodes = {slot.index for slot in group.slots}
            stops = [length + 1 if index in decodes else 1 for index, length in enumerate(lengths)]
            stop_S1 = torch.tensor(stops, device=self.device)[:, None]
            place_C = torch.arange(max(stops), device=self.device)
            hidden_SC = place_C >= stop_S1
            if window is not None:
                hidden_SC |= place_C < stop_S1 - window
            mask = torch.zeros(hidden_SC.shape, dtype=group.slab.keys.dtype, device=self.device)
            mask.masked_fill_(hidden_SC, -math.inf)
            group.masks[window] = mask[:, None].repeat_interleave(group.slab.keys.shape[2], 0)
        return group.masks[window]

    def _prefill(self, block: Block, chunk: Chunk, q_THD: Tensor, keys_GCD: Tensor, values_GCD: Tensor) -> Tensor:
        q_1HTD, keys, values = q_THD.transpose(0, 1)[None], keys_GCD[None], values_GCD[None]
        stop = chunk.slot.length + chunk.tokens
        is_plain = chunk.slot.length == 0 and (block.window is None or stop <= block.window)
        if block.softcap is None:
            mask = None if is_plain else self._prefill_mask(chunk, block.window)
            seen = F.scaled_dot_product_attention(
                q_1HTD, keys, values, attn_mask=mask, is_causal=is_plain, scale=block.scale, enable_gqa=True
            )
            return seen[0].transpose(0, 1)
        repeat = block.heads // block.kv_heads
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        scores = _capped(q_1HTD @ keys.transpose(2, 3) * block.scale, block.softcap)
        scores = scores.masked_fill(~self._prefill_mask(chunk, block.window), -math.inf)
        return (scores.softmax(-1) @ values)[0].transpose(0, 1)

    def _prefill_mask(self, chunk: Chunk, window: int | None) -> Tensor:
        """True where a token may look, (tokens, C)."""
        key = (chunk.row, window)
        if key not in self._masks:
            stop = chunk.slot.length + chunk.tokens
            at_T1 = torch.arange(chunk.slot.length, stop, device=self.device)[:, None]
            place_C = torch.arange(stop, device=self.device)
            sees = place_C <= at_T1
            if window is not None:
                sees &= place_C > at_T1 - window
            self._masks[key] = sees
        return self._masks[key]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return torch.tanh(scores / softcap) * softcap
