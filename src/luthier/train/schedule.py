"""What a run will do, as pure functions of the settings: which rows in which step, and at which learning rate.

Nothing here has state, so a resumed run asks the same questions and gets the same answers.
"""

import hashlib
import math
from collections.abc import Sequence

from luthier.data.batches import plan_epoch
from luthier.train.settings import TrainSettings

Step = list[list[int]]
"""The micro-batches of one optimiser step, each a list of row indices."""


def plan_steps(lengths: Sequence[int], settings: TrainSettings, *, packed: bool = False) -> list[tuple[int, Step]]:
    """Return (epoch, micro-batches) of every optimiser step of the run. `lengths` are the rows' lengths in tokens."""
    steps: list[tuple[int, Step]] = []
    for epoch in range(settings.epochs):
        batches = plan_epoch(
            lengths,
            batch_tokens=settings.batch_tokens,
            max_rows=settings.batch_rows,
            seed=settings.seed,
            epoch=epoch,
            packed=packed,
        )
        width = settings.accumulate * (settings.processes or 1)
        steps += [(epoch, batches[start : start + width]) for start in range(0, len(batches), width)]
    return steps[: settings.max_steps]


def plan_digest(steps: list[tuple[int, Step]], *, packed: bool) -> str:
    """Return a sha256 over which rows meet in which step, and how they lie there."""
    return hashlib.sha256(repr((packed, steps)).encode()).hexdigest()


def learning_rate(step: int, num_steps: int, settings: TrainSettings) -> float:
    """Return the learning rate of `step` (counted from 0) in a run of `num_steps`: linear warm-up, then the schedule."""
    warmup = math.ceil(settings.warmup * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if settings.schedule == "cosine":
        return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return settings.learning_rate * (1 - progress)
    return settings.learning_rate


def anchor_steps(num_steps: int, anchors: int) -> frozenset[int]:
    """Return the steps after which an adapter is kept: 0 (as it began), and `anchors` evenly spaced ones up to the last."""
    if not anchors:
        return frozenset()
    return frozenset({0, *(max(1, round(num_steps * index / anchors)) for index in range(1, anchors + 1))})
