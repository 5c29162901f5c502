"""Losses row by row, and how much better one run is than another on the same rows.

Two runs read the same rows, and most of what makes a row's loss high or low is the row. So their difference is taken row by row,
and its interval is far narrower than that of either mean.

Legend: N rows, K labelled tokens of some of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from luthier.core.errors import DataError

if TYPE_CHECKING:
    from torch import nn

    from luthier.data.encode import EncodedRow

CONFIDENCE = 0.95
"""Of each bound on its own side."""
BATCH_TOKENS = 4096

RowLosses = list[tuple[float, int]]
"""(summed negative log likelihood in nats, labelled tokens) of each row."""


@dataclass(frozen=True)
class Gain:
    """Loss per token that one run saves against another (nats): above 0 it is better. `low` and `high` are 95 % bounds each."""

    value: float
    low: float
    high: float
    rows: int

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "not told apart"."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "not told apart"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict}

    def __str__(self) -> str:
        return f"{self.value:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def row_losses(model: "nn.Module", rows: "Sequence[EncodedRow]", pad_id: int) -> RowLosses:
    """Return loss and labelled tokens of each example, in order; an example that was encoded as several rows counts as one."""
    from luthier.data.batches import collate
    from luthier.engine.batches import batches_by_length
    from luthier.engine.modes import evaluating
    from luthier.engine.score import answer_log_probs, row_sums

    found: dict[int, tuple[float, int]] = {row.row: (0.0, 0) for row in rows}
    with evaluating(model):
        for indices in batches_by_length([len(row) for row in rows], max_tokens=BATCH_TOKENS):
            log_probs_K, rows_K = answer_log_probs(model, collate([rows[index] for index in indices], pad_id))
            sums = row_sums(log_probs_K.double(), rows_K, len(indices)).tolist()
            counts = rows_K.bincount(minlength=len(indices)).tolist()
            for index, total, count in zip(indices, sums, counts, strict=True):
                before = found[rows[index].row]
                found[rows[index].row] = (before[0] - total, before[1] + count)
    return [found[row] for row in sorted(found)]


def mean_loss(losses: RowLosses) -> float:
    """Return the loss per labelled token."""
    return sum(loss for loss, _ in losses) / sum(count for _, count in losses)


def paired_gain(before: RowLosses, after: RowLosses, confidence: float = CONFIDENCE) -> Gain:
    """Return what `after` saves against `before` per token, with bounds from the spread over rows.

    A mean over tokens is a ratio of two sums over rows. Its standard error is sqrt(N / (N - 1) sum_i (d_i - D t_i)^2) / sum_i t_i
    with the difference d_i and the tokens t_i of row i, and D the ratio. The bounds are Student's with N - 1 degrees of freedom.
    Raises: DataError for unlike or fewer than three rows.
    Source: Cochran 1977, "Sampling techniques", section 6.4; t by Hill's expansion, Abramowitz and Stegun 26.7.5.
    """
    if [count for _, count in before] != [count for _, count in after]:
        raise DataError("the two runs were not scored on the same rows")
    N = len(before)
    if N < 3:
        raise DataError(f"{N} rows are too few to tell two runs apart; give three at least, and better some hundred")
    differences = [first[0] - second[0] for first, second in zip(before, after, strict=True)]
    counts = [count for _, count in before]
    tokens = sum(counts)
    D = sum(differences) / tokens
    squares = sum((difference - D * count) ** 2 for difference, count in zip(differences, counts, strict=True))
    margin = student_t(confidence, N - 1) * sqrt(N / (N - 1) * squares) / tokens
    return Gain(D, D - margin, D + margin, N)


def student_t(confidence: float, freedom: int) -> float:
    """Return the quantile of Student's t, to about 1 % from three degrees of freedom on."""
    z, v = NormalDist().inv_cdf(confidence), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3
