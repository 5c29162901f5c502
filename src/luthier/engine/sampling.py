"""The draw of drawing.py as a logits processor of transformers, with one random generator per row.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from transformers import LogitsProcessor

from luthier.engine.drawing import nucleus, with_gumbel_noise

if TYPE_CHECKING:
    from torch import Tensor


class GumbelSampler(LogitsProcessor):
    """Adds to each row's logits the noise of its own generator, so that the arg max is a sample."""

    def __init__(self, rows: Sequence[int], seed: int | Sequence[int], temperature: float, top_p: float):
        self.temperature = temperature
        self.top_p = top_p
        # numpy mixes the two: seed 1, row 0 is not seed 0, row 1. A row's own seed draws as the engine does with that seed.
        self.generators = [np.random.default_rng([seed, row] if isinstance(seed, int) else seed[row]) for row in rows]

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":  # the names are transformers'
        return with_gumbel_noise(nucleus(scores.float() / self.temperature, self.top_p), self.generators)
