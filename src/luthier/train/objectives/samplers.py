"""Who answers prompts during training: an engine beside the model, or the model itself. Both draw the same from the same seeds.

The engine has its own copy of the base's weights, laid out for reading, and answers many prompts at a time; before each sampling
it is given the adapter as it is then, under a new name, and it is asked whether that is what it holds. A model that is answered
for by itself needs no copy, and no known architecture.
"""

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from luthier.adapt.packing import has_packed_layers
from luthier.core.errors import AdapterStateError, ConfigError
from luthier.engine.adapters import content_key
from luthier.engine.generation import generate
from luthier.engine.layouts import is_known
from luthier.engine.requests import Sampling
from luthier.engine.serving import Engine
from luthier.formats.adapters import live_folder
from luthier.layers.base import bare_tree

if TYPE_CHECKING:
    from luthier.train.objectives.settings import RolloutSettings
    from luthier.train.prepare import Prepared

log = logging.getLogger(__name__)

MAX_ROWS = 64
"""Answers that the engine makes at a time."""


@dataclass(frozen=True)
class Answer:
    """An answer as text, and as tokens with the one that ended it. It was cut off where nothing ended it."""

    text: str
    token_ids: tuple[int, ...]
    is_cut: bool


class Sampler(Protocol):
    """Answers prompts with the model as it is now. `seeds`: one for each answer, None for the likeliest tokens."""

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Answer]: ...

    def close(self) -> None: ...


def sampler_for(prepared: "Prepared", settings: "RolloutSettings") -> Sampler:
    """Return what `settings.rollouts` asks for. Raises: ConfigError where the engine is asked for and cannot do it."""
    model = prepared.base.model
    reason = None
    if not is_known(model):
        reason = f"it does not know the architecture {model.config.model_type!r}"
    elif has_packed_layers(model):
        reason = "the base is in 4 bits, and a second copy of it would be too"
    if settings.rollouts == "model" or (settings.rollouts == "auto" and reason):
        return ModelSampler(prepared, settings)
    if reason is None:
        sampler = EngineSampler(prepared, settings)
        reason = sampler.refuses()
        if reason is None:
            return sampler
        sampler.close()
        if settings.rollouts == "auto":
            log.info("the model answers for itself: the engine cannot, since %s", reason)
            return ModelSampler(prepared, settings)
    raise ConfigError(f"objective.rollouts is 'engine', but {reason}; use 'auto' or 'model'")


class ModelSampler:
    """The model that is trained, in evaluation."""

    def __init__(self, prepared: "Prepared", settings: "RolloutSettings"):
        self.prepared, self.settings = prepared, settings

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Answer]:
        settings = self.settings
        sampled = {} if seeds is None else {"temperature": settings.temperature, "top_p": settings.top_p, "seed": list(seeds)}
        base = self.prepared.base
        found = generate(base.model, base.tokenizer, prompts, max_new_tokens=settings.max_new_tokens, **sampled)  # type: ignore[arg-type]
        return [_answer(each.text, each.token_ids, each.stop_token, each.finish_reason) for each in found]

    def close(self) -> None:
        """Nothing is held."""


class EngineSampler:
    """An engine over the base, and the adapter as it was last given."""

    def __init__(self, prepared: "Prepared", settings: "RolloutSettings"):
        self.prepared, self.settings = prepared, settings
        limits = {"max_rows": MAX_ROWS, "max_queue": 2**20}
        self.engine = Engine(bare_tree(prepared.base.model), prepared.base.tokenizer, limits=limits)
        self._numbers = itertools.count()
        self.name, self.key = "", ""

    def refuses(self) -> str | None:
        """Say why adapters of this kind cannot be answered with here; None where they can."""
        if self.engine.slow_because is not None:
            return self.engine.slow_because
        return self.take_adapter()

    def take_adapter(self) -> str | None:
        """Give the engine the adapter as it is now. Returns why it would have to be merged, which needs the base anew."""
        folder = live_folder(self.prepared.base.model, self.prepared.adapter, base=self.prepared.fingerprint)
        key = content_key(folder)
        if key == self.key:
            return None
        before, self.name = self.name, f"training-{next(self._numbers)}"
        self.engine.add_adapter(self.name, lambda: folder)
        merged = self.engine.check_adapter(self.name).needs_merge
        held = {each.name: each.key for each in self.engine.stats()["adapters"].adapters}
        if held[self.name] != key:
            raise AdapterStateError(f"the engine holds another adapter than the one in training ({held[self.name]} for {key})")
        self.key = key
        if before:
            self.engine.unload_adapter(before).result()
        return merged

    def answer(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Answer]:
        if not prompts:
            return []
        self.take_adapter()
        settings = self.settings
        samplings = [Sampling(max_new_tokens=settings.max_new_tokens)] * len(prompts)
        if seeds is not None:
            warmth = {"temperature": settings.temperature, "top_p": settings.top_p}
            samplings = [each.changed(seed=seed, **warmth) for each, seed in zip(samplings, seeds, strict=True)]
        # Each prompt is read once, before the many answers to it are asked for together.
        once = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        if len(once) < len(prompts):
            self.engine.generate_together(once, self.name, [Sampling(max_new_tokens=1)] * len(once))
        found = self.engine.generate_together(prompts, self.name, samplings)
        return [_answer(each.text, each.token_ids, each.stop_token, each.finish_reason) for each in found]

    def close(self) -> None:
        self.engine.close()


def _answer(text: str, token_ids: Sequence[int], stop_token: int | None, finish_reason: str) -> Answer:
    ending = () if stop_token is None else (stop_token,)
    return Answer(text, (*token_ids, *ending), finish_reason == "length")
