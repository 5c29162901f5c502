"""Keys and values of running requests: one slot each, slots of like size side by side in a slab.

A slab holds, for every layer, K and V as (slots, KV heads, capacity, D), its used slots always the first ones: a decoding step
reads them as one tensor, without gathering. Closing a slot moves the last one into the gap. Never knows adapters or tokens.

Shapes: L layers, S slots, H KV heads, C capacity in tokens, D head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST = 128
"""Tokens of the smallest slots; each kind of slot is twice as large as the one before."""


@dataclass
class Slot:
    """The place of one request; `index` changes when others close. `length` counts the tokens that are in it."""

    id: str
    slab: "Slab"
    index: int
    length: int = 0


class Slab:
    """Slots of one capacity. Grows by doubling and is given back when the last slot closes."""

    def __init__(self, layers: int, heads: int, capacity: int, width: int, dtype: torch.dtype, device: torch.device):
        self.capacity = capacity
        self.slots: list[Slot] = []
        self._shape, self._dtype, self._device = (layers, heads, capacity, width), dtype, device
        self.keys = self._new(0)
        self.values = self._new(0)

    @property
    def bytes(self) -> int:
        """Memory reserved; pages that no token was written to are not resident."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def open(self, id: str) -> Slot:
        """Return a new slot at the end."""
        if len(self.slots) == self.keys.shape[1]:
            self._resize(max(2, 2 * len(self.slots)))
        slot = Slot(id, self, len(self.slots))
        self.slots.append(slot)
        return slot

    def close(self, slot: Slot) -> None:
        """Free a slot; the last one moves into its place."""
        last = self.slots.pop()
        if last is not slot:
            for kept in (self.keys, self.values):
                kept[:, slot.index, :, : last.length] = kept[:, last.index, :, : last.length]
            last.index = slot.index
            self.slots[last.index] = last
        if not self.slots:
            self._resize(0)

    def _new(self, slots: int) -> Tensor:
        layers, heads, capacity, width = self._shape
        # Zeros, not what memory holds: a masked position counts nothing, but 0 times NaN would.
        return torch.zeros((layers, slots, heads, capacity, width), dtype=self._dtype, device=self._device)

    def _resize(self, slots: int) -> None:
        used = len(self.slots)
        for name in ("keys", "values"):
            resized = self._new(slots)
            if used:
                resized[:, :used] = getattr(self, name)[:, :used]
            setattr(self, name, resized)


class KvCache:
    """The slots of all running requests, by id."""

    def __init__(self, layers: int, heads: int, width: int, dtype: torch.dtype, device: torch.device):
        self._shape, self._dtype, self._device = (layers, heads, width), dtype, device
        self._slabs: dict[int, Slab] = {}
        self._slots: dict[str, Slot] = {}

    @property
    def bytes(self) -> int:
        """Memory reserved in all slabs."""
        return sum(slab.bytes for slab in self._slabs.values())

    def bytes_per_token(self) -> int:
        """What one token takes in all layers."""
        layers, heads, width = self._shape
        return 2 * layers * heads * width * self._dtype.itemsize

    def open(self, id: str, tokens: int) -> Slot:
        """Reserve room for `tokens` tokens."""
        capacity = SMALLEST
        while capacity < tokens:
            capacity *= 2
        layers, heads, width = self._shape
        if capacity not in self._slabs:
            self._slabs[capacity] = Slab(layers, heads, capacity, width, self._dtype, self._device)
        self._slots[id] = self._slabs[capacity].open(id)
        return self._slots[id]

    def close(self, id: str) -> None:
        """Give the room back."""
        slot = self._slots.pop(id)
        slot.slab.close(slot)

    def slot(self, id: str) -> Slot:
        """Return the slot of a running request."""
        return self._slots[id]

    def read(self, id: str, start: int, stop: int) -> Tensor:
        """Return a copy of the keys and values of some tokens, (2, L, H, tokens, D)."""
        slot = self._slots[id]
        return torch.stack([kept[:, slot.index, :, start:stop] for kept in (slot.slab.keys, slot.slab.values)])

    def write(self, id: str, start: int, kept: Tensor) -> None:
        """Put back what `read` gave; the slot then holds all tokens up to the end of it."""
        slot = self._slots[id]
        stop = start + kept.shape[3]
        slot.slab.keys[:, slot.index, :, start:stop], slot.slab.values[:, slot.index, :, start:stop] = kept
        slot.length = stop
