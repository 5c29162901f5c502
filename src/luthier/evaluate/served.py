"""Served: greedy answers from an engine that has the same base and adapter, since many prompts at once are its trade.

Losses and log-likelihoods stay with the live model, which is as fast there. In float32 the answers are the same; elsewhere two
nearly equal tokens may swap, so what was scored by one is not kept for the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.engine import Completion, Engine


@dataclass(frozen=True)
class Served:
    """An engine over a live model's base, and the name that the adapter on that model has there."""

    engine: "Engine"
    adapter: str

    def answers(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_texts: Sequence[str] = (),
        on_progress: Callable[[int, int], None] | None = None,
    ) -> "list[Completion]":
        """Answer as the live model would as it is now: with its adapter, or without where that is silent.

        Raises: DataError for prompts that the model cannot read, all of them listed.
        """
        from luthier.engine import Sampling
        from luthier.engine.generation import check_prompts
        from luthier.evaluate.judgement import active_adapters

        check_prompts(model, prompts, max_new_tokens)
        adapter = self.adapter if active_adapters(model) else None
        sampling = Sampling(max_new_tokens=max_new_tokens, stop=tuple(stop_texts))
        return self.engine.generate(prompts, adapter, sampling, on_progress=on_progress)
