"""Keys and values of prompts seen before, so that a common beginning is computed once.

Kept in blocks of BLOCK tokens, each under a digest of everything that its numbers depend on: the adapters (by content) with their
weights, and all tokens up to its end. So requests of different adapters can never share, and a changed adapter has other keys by
itself. Blocks are copies: evicting one hurts no running request. They lie in one piece of memory that is made once: as tensors
of their own, coming and going between a step's temporaries, they left holes, and a process grew by a block a request for good.

Shapes: L layers, H KV heads, D head width.
"""

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from luthier.engine.requests import Mix

BLOCK = 32
Digest = bytes


class PrefixCache:
    """Blocks by digest, the least recently used ones forgotten first when `limit_bytes` is reached."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._places: OrderedDict[Digest, int] = OrderedDict()
        self._made_with: dict[Digest, Mix] = {}
        self._pool: Tensor | None = None  # (blocks, 2, L, H, BLOCK, D); the kernel gives a page when it is first written
        self._free: list[int] = []

    @property
    def bytes(self) -> int:
        """How much of the limit is taken."""
        return len(self._places) * self._pool[0].nbytes if self._pool is not None and len(self._pool) else 0

    def match(self, mix: Mix, tokens: Sequence[int]) -> int:
        """Return how many of the first tokens are kept, never all: the last one must run to be continued."""
        found = 0
        for digest in _digests(mix, tokens[: len(tokens) - 1]):
            if digest not in self._places:
                break
            found += BLOCK
        return found

    def read(self, mix: Mix, tokens: Sequence[int]) -> Tensor | None:
        """Return what is kept of the beginning, (2, L, H, tokens, D), None if nothing is."""
        places = []
        for digest in _digests(mix, tokens[: len(tokens) - 1]):
            if digest not in self._places:
                break
            self._places.move_to_end(digest)
            places.append(self._places[digest])
        self.hits += len(places)
        self.misses += (len(tokens) - 1) // BLOCK - len(places)
        if not places:
            return None
        assert self._pool is not None
        return torch.cat([self._pool[place] for place in places], dim=3)

    def missing(self, mix: Mix, tokens: Sequence[int]) -> int | None:
        """Return the first token whose block is not kept yet, None if all whole blocks are."""
        for place, digest in enumerate(_digests(mix, tokens)):
            if digest not in self._places:
                return place * BLOCK
        return None

    def keep(self, mix: Mix, tokens: Sequence[int], start: int, kept: Tensor) -> None:
        """Keep the blocks from token `start` on; `kept` (2, L, H, tokens, D) begins there."""
        if self._pool is None:
            shape = (*kept.shape[:3], BLOCK, kept.shape[4])
            block_bytes = math.prod(shape) * kept.element_size()
            self._pool = kept.new_empty((self.limit_bytes // block_bytes, *shape))
            self._free = list(range(len(self._pool)))[::-1]
        for number, digest in enumerate(_digests(mix, tokens)):
            at = number * BLOCK - start
            if at < 0 or digest in self._places or not len(self._pool):
                continue
            if not self._free:
                self._drop(next(iter(self._places)))
            place = self._free.pop()
            self._pool[place].copy_(kept[:, :, :, at : at + BLOCK])
            self._places[digest], self._made_with[digest] = place, mix

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop the blocks that were computed with an adapter that is none of these; those of the base stay."""
        for digest in [digest for digest, mix in self._made_with.items() if any(key not in keys for key, _ in mix)]:
            self._drop(digest)

    def _drop(self, digest: Digest) -> None:
        self._free.append(self._places.pop(digest))
        del self._made_with[digest]


def _digests(mix: Mix, tokens: Sequence[int]) -> list[Digest]:
    """One digest for each whole block; each holds those before it."""
    digests, before = [], repr(sorted(mix)).encode()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = b",".join(b"%d" % token for token in tokens[start : start + BLOCK])
        before = hashlib.sha256(before + b"|" + block).digest()
        digests.append(before)
    return digests
