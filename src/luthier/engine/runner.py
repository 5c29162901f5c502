"""One step of many requests through the decoder: rows in, logits of each request's last row out.

Decides nothing: the scheduler says who runs, the engine which adapters are active. A request keeps its slot from `open` to
`close`; its tokens come in order, in pieces of any size.

Shapes: T rows, I hidden width, V vocabulary, B requests of the step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from luthier.engine.attention import Chunk, StepAttention
from luthier.engine.decoder import Decoder
from luthier.engine.kv import KvCache, Slot
from luthier.engine.prefix import PrefixCache
from luthier.engine.requests import Mix
from luthier.engine.stacks import AdapterStacks, PairLike, Run, StepAdapters, in_order

BASE = ""
"""The name of the untouched base among the decoders."""

SCORED_AT_ONCE = 128
"""Rows whose logits are there at once when targets are scored."""


@dataclass
class _Running:
    slot: Slot
    decoder: str
    mix: Mix
    identity: Mix
    tokens: list[int]


@dataclass(frozen=True)
class Piece:
    """The next tokens of a request. `wants_logits`: whether the last one is to be continued.

    `targets`: for each token the one whose log-probability behind it is asked for, -1 for none. `wants_hidden`: whether the last
    hidden states of all of them are.
    """

    id: str
    tokens: Sequence[int]
    wants_logits: bool = True
    targets: Sequence[int] | None = None
    wants_hidden: bool = False


@dataclass(frozen=True)
class Stepped:
    """What a step gave: float32 logits (B, V), a row for each piece that wants them in the order of the pieces, and by the place
    of a piece with targets their log-probabilities; of one that wants them, its last hidden states (T, I), the last norm applied.
    """

    logits: Tensor
    scores: dict[int, list[float]]
    hidden: dict[int, Tensor] = field(default_factory=dict)


def target_logprobs(logits_TV: Tensor, targets: Sequence[int]) -> list[float]:
    """Return the log-probability (nats) of each target, its row of logits being the one at its place."""
    wanted_T1 = torch.tensor(targets, device=logits_TV.device)[:, None]
    values: list[float] = (logits_TV.gather(1, wanted_T1).squeeze(1) - logits_TV.logsumexp(1)).tolist()
    return values


class Runner:
    """Runs requests of the base, of batched adapters, and of adapters that had to be merged into a copy of the base."""

    def __init__(self, decoder: Decoder, *, prefix_bytes: int = 0):
        block = decoder.layout.blocks[0]
        self.decoders = {BASE: decoder}
        self.device, self.dtype = decoder.device, decoder.dtype
        self.kv = KvCache(len(decoder.layout.blocks), block.kv_heads, block.head_dim, decoder.dtype, decoder.device)
        self.stacks = AdapterStacks(decoder.projections, decoder.dtype, decoder.device)
        self.prefix = PrefixCache(prefix_bytes) if prefix_bytes else None
        self._running: dict[str, _Running] = {}

    @torch.inference_mode()
    def activate(self, key: str, rank: int, pairs: Mapping[str, PairLike]) -> None:
        """Make room for an adapter in the batch."""
        self.stacks.activate(key, rank, pairs)

    @torch.inference_mode()
    def deactivate(self, key: str) -> None:
        """Take an adapter, batched or merged, out again."""
        if key in self.decoders:
            del self.decoders[key]
        else:
            self.stacks.deactivate(key)

    def activate_merged(self, key: str, decoder: Decoder) -> None:
        """Serve an adapter through a decoder of its own, into which it was merged."""
        self.decoders[key] = decoder

    def cached_tokens(self, mix: Mix, tokens: Sequence[int]) -> int:
        """How many first tokens of such a prompt would not have to run."""
        return self.prefix.match(mix, tokens) if self.prefix is not None else 0

    @torch.inference_mode()
    def open(self, id: str, mix: Mix, prompt: Sequence[int], room: int) -> int:
        """Reserve `room` tokens for a request; return how many tokens of its prompt are there already."""
        merged = [key for key, _ in mix if key in self.decoders]
        slot = self.kv.open(id, room)
        running = _Running(slot, merged[0] if merged else BASE, () if merged else mix, mix, [])
        self._running[id] = running
        kept = self.prefix.read(mix, prompt) if self.prefix is not None else None
        if kept is not None:
            self.kv.write(id, 0, kept)
            running.tokens.extend(prompt[: slot.length])
        return slot.length

    @torch.inference_mode()
    def close(self, id: str) -> None:
        """End a request; what it computed may serve as the beginning of others."""
        self.remember(id)
        del self._running[id]
        self.kv.close(id)

    @torch.inference_mode()
    def remember(self, id: str) -> None:
        """Keep the whole blocks that a request has computed so far."""
        running = self._running[id]
        if self.prefix is None:
            return
        start = self.prefix.missing(running.identity, running.tokens)
        if start is not None:
            kept = self.kv.read(id, start, running.slot.length)
            self.prefix.keep(running.identity, running.tokens, start, kept)

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> Stepped:
        """Run the next tokens of some requests, each at most once."""
        rows: dict[int, Tensor] = {}
        scores: dict[int, list[float]] = {}
        hidden: dict[int, Tensor] = {}
        for name, decoder in self.decoders.items():
            own = [place for place, piece in enumerate(pieces) if self._running[piece.id].decoder == name]
            if own:
                rows |= self._run(decoder, pieces, own, scores, hidden)
        for piece in pieces:
            running = self._running[piece.id]
            running.tokens.extend(piece.tokens)
            running.slot.length += len(piece.tokens)
        if not rows:
            return Stepped(torch.empty(0, self.decoders[BASE].layout.embedding.shape[0]), scores, hidden)
        return Stepped(torch.stack([rows[place] for place in sorted(rows)]), scores, hidden)

    def _run(
        self,
        decoder: Decoder,
        pieces: Sequence[Piece],
        places: Sequence[int],
        scores: dict[int, list[float]],
        hidden: dict[int, Tensor],
    ) -> dict[int, Tensor]:
        """Run some of the pieces through one decoder; return the logits of each that wants them, by place; fill the rest."""

        def order(place: int) -> tuple[bool, bool, int]:
            piece = pieces[place]
            return in_order(self.stacks, self._running[piece.id].mix, len(piece.tokens))

        single = sorted((place for place in places if len(pieces[place].tokens) == 1), key=order)
        several = sorted((place for place in places if len(pieces[place].tokens) > 1), key=order)
        ids: list[int] = []
        positions: list[int] = []
        runs, chunks, last = [], [], {}
        for place in (*single, *several):
            piece, running = pieces[place], self._running[pieces[place].id]
            start = len(ids)
            ids.extend(piece.tokens)
            positions.extend(range(running.slot.length, running.slot.length + len(piece.tokens)))
            runs.append(Run(start, len(ids), running.mix))
            last[place] = len(ids) - 1
            if len(piece.tokens) > 1:
                chunks.append(Chunk(running.slot, start, len(piece.tokens)))
        attention = StepAttention([self._slot(pieces[place]) for place in single], chunks, self.device)
        adapters = StepAdapters(self.stacks, runs)
        hidden_TI = decoder.hidden(
            torch.tensor(ids, device=self.device), torch.tensor(positions, device=self.device), adapters, attention
        )
        for place, run in zip((*single, *several), runs, strict=True):
            if pieces[place].targets is not None:
                scores[place] = self._scores(decoder, hidden_TI[run.start : run.stop], pieces[place], run.mix)
            if pieces[place].wants_hidden:
                hidden[place] = hidden_TI[run.start : run.stop].float()
        wanted = [place for place in (*single, *several) if pieces[place].wants_logits]
        if not wanted:
            return {}
        if len(wanted) < len(ids):
            hidden_TI = hidden_TI[torch.tensor([last[place] for place in wanted], device=self.device)]
            runs = [Run(row, row + 1, self._running[pieces[place].id].mix) for row, place in enumerate(wanted)]
            adapters = StepAdapters(self.stacks, runs)
        return dict(zip(wanted, decoder.logits(hidden_TI, adapters), strict=True))

    def _scores(self, decoder: Decoder, hidden_TI: Tensor, piece: Piece, mix: Mix) -> list[float]:
        """The log-probabilities of a piece's targets; logits are there for a few rows at a time."""
        assert piece.targets is not None
        asked = [row for row, target in enumerate(piece.targets) if target >= 0]
        values: list[float] = []
        for start in range(0, len(asked), SCORED_AT_ONCE):
            part = asked[start : start + SCORED_AT_ONCE]
            adapters = StepAdapters(self.stacks, [Run(0, len(part), mix)])
            logits_TV = decoder.logits(hidden_TI[torch.tensor(part, device=self.device)], adapters)
            values += target_logprobs(logits_TV, [piece.targets[row] for row in part])
        return values

    def _slot(self, piece: Piece) -> Slot:
        return self._running[piece.id].slot
