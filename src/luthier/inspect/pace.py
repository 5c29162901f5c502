"""How long a step takes on this machine: the operations of its products, over a rate measured on products of its sizes."""

import time
from collections import Counter
from dataclasses import dataclass

import torch

from luthier.inspect.step_trace import StepTrace
from luthier.ops.products import fast_products

OVERHEAD = (1.15, 2.0)
"""A step's time as a multiple of its products' alone, at best and at worst: norms, gates, softmax and optimiser are passes over
memory. A guess, not a measured band: no series of timed steps was held against it."""
MEASURED_SHARE = 0.95
"""Of the operations whose products are timed themselves, largest first; the rest goes at their mean rate."""
SAMPLE_FLOPS = 5e8
"""Of a timed product at most: a larger one is timed on fewer rows."""
ROUNDS = 5


@dataclass(frozen=True)
class Pace:
    """Measured operations per second over a step's products, and what follows for the step."""

    flops_per_second: float
    num_threads: int
    product_seconds: float

    @property
    def seconds(self) -> tuple[float, float]:
        """The step's seconds, at best and at worst."""
        return self.product_seconds * OVERHEAD[0], self.product_seconds * OVERHEAD[1]


def measure_pace(trace: StepTrace, dtype: torch.dtype) -> Pace:
    """Time products of the sizes a step has, in the dtype they are formed in for tensors of `dtype`; a few seconds at most."""
    dtype = fast_products(torch.empty(0, dtype=dtype))
    flops = Counter({(m, k, n): 2 * m * k * n * count for (m, k, n), count in trace.products.items()})
    total, timed, seconds = sum(flops.values()), 0, 0.0
    for sizes, part in flops.most_common():
        if timed >= MEASURED_SHARE * total:
            break
        timed += part
        seconds += part / _rate(*sizes, dtype)
    rate = timed / seconds
    return Pace(rate, torch.get_num_threads(), trace.flops / rate)


def _rate(rows: int, inner: int, columns: int, dtype: torch.dtype) -> float:
    """Return operations per second of a product (rows, inner) x (inner, columns): the best of a few rounds."""
    share = min(1.0, SAMPLE_FLOPS / (2 * rows * inner * columns))
    # A product for a weight's gradient is long inside, one with a weight has many rows: the axis that tokens are on is cut.
    if rows >= inner:
        rows = max(1, int(rows * share))
    else:
        inner = max(1, int(inner * share))
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first is slower than any after it
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * columns / best
