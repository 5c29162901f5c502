"""Keys and values of prompts seen before, so that a common beginning is computed once.

Kept in blocks of BLOCK tokens, each under a digest of everything that its numbers depend on: the adapters (by content) with their
weights, and all tokens up to its end. So requests of different adapters can never share, and a changed adapter has other keys by
itself. Blocks are copies: evicting one hurts no running request.

Shapes: L layers, H KV heads, D head width.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from luthier.engine.requests import Mix

BLOCK = 32


class PrefixCache:
    """Blocks by digest, the least recently used ones forgotten first when `limit_bytes` is reached."""

    def __init__(self, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.bytes = 0
        self.hits = self.misses = 0
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self._made_with: dict[bytes, Mix] = {}

    def match(self, mix: Mix, tokens: Sequence[int]) -> int:
        """Return how many of the first tokens are kept, never all: the last one must run to be continued."""
        found = 0
        for digest in _digests(mix, tokens[: len(tokens) - 1]):
            if digest not in self._blocks:
                break
            found += BLOCK
        return found

    def read(self, mix: Mix, tokens: Sequence[int]) -> Tensor | None:
        """Return what is kept of the beginning, (2, L, H, tokens, D), None if nothing is."""
        blocks = []
        for digest in _digests(mix, tokens[: len(tokens) - 1]):
            if digest not in self._blocks:
                break
            self._blocks.move_to_end(digest)
            blocks.append(self._blocks[digest])
        self.hits += len(blocks)
        self.misses += (len(tokens) - 1) // BLOCK - len(blocks)
        return torch.cat(blocks, dim=3) if blocks else None

    def missing(self, mix: Mix, tokens: Sequence[int]) -> int | None:
        """Return the first token whose block is not kept yet, None if all whole blocks are."""
        for place, digest in enumerate(_digests(mix, tokens)):
            if digest not in self._blocks:
                return place * BLOCK
        return None

    def keep(self, mix: Mix, tokens: Sequence[int], start: int, kept: Tensor) -> None:
        """Keep the blocks from token `start` on; `kept` (2, L, H, tokens, D) begins there."""
        for place, digest in enumerate(_digests(mix, tokens)):
            at = place * BLOCK - start
            if at < 0 or digest in self._blocks:
                continue
            self._blocks[digest], self._made_with[digest] = kept[:, :, :, at : at + BLOCK].clone(), mix
            self.bytes += self._blocks[digest].numel() * kept.element_size()
        while self.bytes > self.limit_bytes:
            self._drop(next(iter(self._blocks)))

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop the blocks that were computed with an adapter that is none of these; those of the base stay."""
        for digest in [digest for digest, mix in self._made_with.items() if any(key not in keys for key, _ in mix)]:
            self._drop(digest)

    def _drop(self, digest: bytes) -> None:
        forgotten = self._blocks.pop(digest)
        del self._made_with[digest]
        self.bytes -= forgotten.numel() * forgotten.element_size()


def _digests(mix: Mix, tokens: Sequence[int]) -> list[bytes]:
    """One digest for each whole block; each holds those before it."""
    digests, before = [], repr(sorted(mix)).encode()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        block = b",".join(b"%d" % token for token in tokens[start : start + BLOCK])
        before = hashlib.sha256(before + b"|" + block).digest()
        digests.append(before)
    return digests
