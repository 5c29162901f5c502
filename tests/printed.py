"""Numbers as pages print them, held against numbers as they are."""

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

CHECKED = re.compile(r"\*\*([^*]+)\*\*|`([^`]+)`")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def printed_numbers(text: str) -> list[str]:
    """Return the numbers in the bold and typewriter parts of a text, as they are printed."""
    parts = [bold or code for bold, code in CHECKED.findall(text)]
    return [number for part in parts for number in NUMBER.findall(part)]


def agrees(printed: str, value: float) -> bool:
    """Tell whether `printed` is `value`, rounded to the digits that are printed."""
    _, _, decimals = printed.partition(".")
    return abs(float(printed.replace(",", "")) - value) <= 0.5 * 10.0 ** -len(decimals) * (1 + 1e-9)


def flat(values: Iterable[Any]) -> list[float]:
    """Return numbers, tensors and lists of them as one list of numbers."""
    out: list[float] = []
    for value in values:
        out += value.flatten().tolist() if isinstance(value, Tensor) else flat(value) if isinstance(value, list) else [value]
    return out
