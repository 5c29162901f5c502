"""Serving through the model's own forward, for architectures the engine has no forward for: slower, and as right.

Each request has a cache of its own and runs by itself; its adapters are switched on in the live model for its turn. The same
steps as `luthier.engine.runner`, so the rest of the engine does not know the difference.

Shapes: T tokens of a piece, V vocabulary, B requests of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from luthier.adapt.attaching import detach
from luthier.adapt.switching import activate, disabled
from luthier.engine.requests import Mix
from luthier.engine.runner import Piece, Stepped, target_logprobs
from luthier.formats.adapters import load_adapter
from luthier.formats.folder import AdapterFolder


@dataclass
class _Running:
    mix: Mix
    cache: Any
    length: int = 0


class FallbackRunner:
    """Runs requests one after the other through a transformers model that adapters are attached to.

    Until `leave` the model is in evaluation mode and may wear adapters; afterwards it is as it came.
    """

    def __init__(self, model: Any):
        self.model = model
        self._modes = [(module, module.training) for module in model.modules()]
        model.eval()
        self.device = next(model.parameters()).device
        self._running: dict[str, _Running] = {}
        self._attached: set[str] = set()

    def activate_folder(self, key: str, folder: AdapterFolder, *, force: bool = False) -> None:
        """Attach an adapter of any kind, as it was read."""
        load_adapter(self.model, folder, _name(key), force=force)
        self._attached.add(key)

    def leave(self) -> None:
        """Give the model back as it was."""
        for key in list(self._attached):
            self.deactivate(key)
        for module, was_training in self._modes:
            module.training = was_training

    def deactivate(self, key: str) -> None:
        """Take an adapter out of the model."""
        detach(self.model, _name(key))
        self._attached.discard(key)

    def cached_tokens(self, mix: Mix, tokens: Sequence[int]) -> int:
        """None: caches of unknown layers are not shared."""
        return 0

    def open(self, id: str, mix: Mix, prompt: Sequence[int], room: int) -> int:
        """Begin a request. Raises: AdapterStateError for adapters that the model cannot use together."""
        if mix:
            activate(self.model, {_name(key): weight for key, weight in mix})
        self._running[id] = _Running(mix, DynamicCache(config=self.model.config))
        return 0

    def remember(self, id: str) -> None:
        """Nothing is kept beyond the request."""

    def close(self, id: str) -> None:
        """End a request."""
        del self._running[id]

    @torch.inference_mode()
    def step(self, pieces: Sequence[Piece]) -> Stepped:
        """Run the next tokens of some requests, as `Runner.step` does."""
        logits: list[Tensor] = []
        scores: dict[int, list[float]] = {}
        hidden: dict[int, Tensor] = {}
        for place, piece in enumerate(pieces):
            output = self._run(piece)
            logits_TV = output.logits[0].float()
            if piece.wants_hidden:
                hidden[place] = output.hidden_states[-1][0].float()
            if piece.targets is not None:
                asked = [row for row, target in enumerate(piece.targets) if target >= 0]
                scores[place] = target_logprobs(logits_TV[asked], [piece.targets[row] for row in asked]) if asked else []
            if piece.wants_logits:
                logits.append(logits_TV[-1])
        return Stepped(torch.stack(logits) if logits else torch.empty(0, 0), scores, hidden)

    def _run(self, piece: Piece) -> Any:
        running = self._running[piece.id]
        ids = torch.tensor([list(piece.tokens)], device=self.device)
        kept = {"past_key_values": running.cache, "use_cache": True, "output_hidden_states": piece.wants_hidden}
        if running.mix:
            activate(self.model, {_name(key): weight for key, weight in running.mix})
            output = self.model(input_ids=ids, **kept)
        elif self._attached:
            with disabled(self.model):
                output = self.model(input_ids=ids, **kept)
        else:
            output = self.model(input_ids=ids, **kept)
        running.length += len(piece.tokens)
        return output


def _name(key: str) -> str:
    """A name that parameters may bear."""
    return f"served_{key[:16]}"
