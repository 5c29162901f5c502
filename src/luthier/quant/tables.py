"""The values that the codes of 4-bit weights and of their 8-bit scales stand for."""

import torch
from torch import Tensor

NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Code -> value: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero (Dettmers et al. 2023, QLoRA,
arXiv:2305.14314, section 3). The digits are those of bitsandbytes, so that the bytes are too."""


def nf4_values(device: torch.device | None = None) -> Tensor:
    """Return the value of each of the 16 codes, in float32."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32, device=device)


def dynamic_values(device: torch.device | None = None) -> Tensor:
    """Return the value of each of the 256 codes of a scale, in float32 and in order.

    Decade e below 1 has 2^(6-e) values of each sign, in the middle of equal steps from 0.1 to 1; besides there are 0 and 1.
    Source: Dettmers 2015, arXiv:1511.04561.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (6 - e) + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        values += [value for sign in (1, -1) for value in (sign * 10.0**-e * middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
