"""What 64 values of a matrix tell: is one copy the other, rounded to few levels?

Rounding to the nearest level can be checked without knowing the levels in advance: they stand in the rounded copy, and each
original value must lie nearer to its own level than to any other. Another fine-tune puts values into the wrong cells, at a
rate that grows with the change. fingerprint.py decides what follows from that; this file counts, with numpy only.
"""

import base64
import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

GROUP = 32
"""Levels are found among this many neighbours: the smallest block common to NF4 (64), Q4_0, Q4_1, Q8_0 and Q4_K (32)."""
FEW_LEVELS = 24
"""At most so many different values among 32 neighbours: stored in 4 or 5 bits. Ordinary weights show 28 to 32."""
ROUNDING = 2.0**-8
"""Half a unit in the last place of bfloat16: by so much a stored value, and with it the border of a cell, may be off."""
FARTHEST = 0.5
"""Relative distance beyond which nothing is a rounded copy; 4-bit rounding gives 0.1, 3-bit 0.2."""


@dataclass(frozen=True)
class Rounding:
    """One matrix of the `original` held against the same values of the `rounded` copy."""

    kind: str
    """The module's name without layer numbers: "model.layers.q_proj.weight"."""
    is_rounded: bool
    """The copy's values lie on few levels (or on an 8-bit grid) and are near the original's."""
    num_values: int
    num_wrong: int
    """How many original values lie outside their level's cell."""
    spread: float
    """Median distance from a level as a share of its cell: about 0.5 after rounding, near 0 for a small change of the levels."""
    is_eight_bit: bool = False
    """It lies on an 8-bit grid; else on so few levels that 5 bits hold them."""


def compare_sketches(name: str, original: str, rounded: str) -> Rounding:
    """Count what `Rounding` holds for one matrix, given both sketches as the fingerprint stores them."""
    kind = re.sub(r"\.\d+(?=\.|$)", "", name)
    x, y = _decode(original), _decode(rounded)
    if x.shape != y.shape or not x.size or np.array_equal(x, y):
        return Rounding(kind, False, int(x.size), 0, 0.0)
    is_near = bool(np.linalg.norm(x - y) <= FARTHEST * np.linalg.norm(x))
    wrong, depths, all_on_levels, is_eight_bit = 0, [], True, False
    for start in range(0, x.size, GROUP):
        group_x, group_y = x[start : start + GROUP], y[start : start + GROUP]
        if np.unique(group_y).size <= max(1, FEW_LEVELS * group_y.size // GROUP):
            half_up, half_down = _cells(group_y)
        elif (step := _eight_bit_step(group_y)) > 0:
            half_up = half_down = np.full(group_y.size, step / 2)
            is_eight_bit = True
        else:
            all_on_levels = False
            break
        error = group_x - group_y
        half = np.where(error > 0, half_up, half_down)
        slack = ROUNDING * (np.abs(group_y) + np.where(np.isfinite(half), half, 0.0))
        wrong += int((np.abs(error) > half + slack).sum())
        depths.append(np.abs(error[np.isfinite(half)]) / half[np.isfinite(half)])
    if not all_on_levels or not is_near:
        return Rounding(kind, False, int(x.size), 0, 0.0)
    depth = np.concatenate(depths)
    return Rounding(kind, True, int(x.size), wrong, float(np.median(depth)) if depth.size else 0.0, is_eight_bit)


def _decode(text: str) -> Floats:
    """bfloat16 is the upper half of a float32."""
    halves = np.frombuffer(base64.b64decode(text), dtype="<u2").astype("<u4")
    return (halves << 16).view("<f4").astype(np.float64)


def _cells(y: Floats) -> tuple[Floats, Floats]:
    """Half the distance from each value to the next level above and below; infinite at the ends, where quantisers clip."""
    levels = np.unique(y)
    gaps = np.concatenate(([np.inf], np.diff(levels), [np.inf])) / 2
    place = np.searchsorted(levels, y)
    return gaps[place + 1], gaps[place]


def _eight_bit_step(y: Floats) -> float:
    """Return the step of an 8-bit grid that holds `y`, or 0.0.

    The largest value is k steps for some k up to 127 (128 in GGUF's rounding). bfloat16 blurs a value and the step by 1/256
    each, so large multiples say nothing; on the small ones ordinary weights agree with some step about once in ten thousand.
    """
    largest = np.abs(y).max()
    if largest == 0 or not np.isfinite(largest):
        return 0.0
    steps = largest / np.arange(128, 15, -1)
    multiples = np.abs(y) / steps[:, None]
    small = multiples < 48
    error = np.where(small, np.abs(multiples - np.round(multiples)), 0.0)
    holds = ~(error > 0.05 + multiples / 128).any(axis=1) & (small.sum(axis=1) >= y.size // 4)
    if not holds.any():
        return 0.0
    # Neighbouring steps hold too, but fit worse; half the true step fits as well, so the largest of the best is taken.
    misfit = np.where(holds, error.sum(axis=1) / np.maximum(small.sum(axis=1), 1), np.inf)
    return float(steps[misfit <= 1.5 * misfit.min()].max())
