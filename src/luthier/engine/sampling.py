"""How the next token is drawn: temperature, nucleus (top-p), and one random generator per row.

The draw is Gumbel-max: with Gumbel noise added to the logits, the arg max *is* a sample of the softmax. So transformers can
always run its greedy loop, no global random state is read or moved, and what a row samples does not depend on its batch mates.

Shapes: B rows, V vocabulary.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from torch import Tensor


def nucleus(logits_BV: "Tensor", top_p: float) -> "Tensor":
    """Return the logits with all but the most likely tokens at -inf: the fewest whose probabilities add up to `top_p`.

    The most likely token always stays. Source: Holtzman et al. 2019, section 3.1 (arXiv:1904.09751).
    """
    if top_p >= 1.0:
        return logits_BV
    sorted_logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True)
    probabilities_BV = sorted_logits_BV.softmax(dim=-1)
    likelier_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV  # the mass in front of each token
    is_out_BV = likelier_BV >= top_p
    is_out_BV[..., 0] = False
    return logits_BV.masked_fill(is_out_BV.scatter(-1, order_BV, is_out_BV), -torch.inf)


class GumbelSampler(LogitsProcessor):
    """Adds to each row's logits the noise of its own generator, so that the arg max is a sample."""

    def __init__(self, rows: Sequence[int], seed: int, temperature: float, top_p: float):
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator().manual_seed(_row_seed(seed, row)) for row in rows]

    def __call__(self, input_ids: "Tensor", scores: "Tensor") -> "Tensor":  # the names are transformers'
        logits_BV = nucleus(scores.float() / self.temperature, self.top_p)
        vocabulary = logits_BV.shape[-1]
        waits_BV = torch.stack([torch.empty(vocabulary).exponential_(generator=each) for each in self.generators])
        return logits_BV - waits_BV.log().to(logits_BV.device)  # -log of an exponential draw is a Gumbel draw


def _row_seed(seed: int, row: int) -> int:
    """A seed per row that neighbouring seeds and rows do not share (seed 1, row 0 is not seed 0, row 1)."""
    return random.Random(f"{seed}:{row}").getrandbits(63)
