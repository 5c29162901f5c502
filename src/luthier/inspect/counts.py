"""How many parameters a model has and how many an adapter of each rank would train, counted on models without numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.adapt.planning import AttachPlan, plan
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.layers.packable import split_linears

if TYPE_CHECKING:
    from torch import nn

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MASTER_BYTES = 4
"""Pairs are trained and stored in float32."""


@dataclass(frozen=True)
class RankRow:
    """What an adapter of one rank comes to: parameters in it and trained, its file, and what training it holds (bytes)."""

    r: int
    num_parameters: int
    num_trained: int
    share: float
    file_bytes: int
    state_bytes: int


def with_rank(config: LoraConfig, r: int) -> LoraConfig:
    """Return `config` at rank r. AdaLoRA aims at r and begins with half as much again, as PEFT's defaults do."""
    if isinstance(config, AdaLoraConfig):
        return config.changed(target_r=r, init_r=-(-3 * r // 2))
    return config.changed(r=r)


def num_frozen_A(planned: AttachPlan) -> int:
    """Return how many numbers LoRA-FA leaves as they began."""
    return sum(math.prod(layer.shapes["lora_A"]) for layer in planned.layers)


def rank_table(
    model: "nn.Module", config: LoraConfig, ranks: Sequence[int] = RANKS, *, freeze_A: bool = False, moment_bytes: float = 4
) -> list[RankRow]:
    """Return a row for each rank. `state_bytes` are the pairs, the gradients and AdamW's two moments of what is trained."""
    rows = []
    for r in ranks:
        planned = plan(model, with_rank(config, r))
        trained = planned.num_parameters - freeze_A * num_frozen_A(planned)
        state = planned.num_parameters * MASTER_BYTES + trained * (MASTER_BYTES + 2 * moment_bytes)
        rows.append(
            RankRow(
                r,
                planned.num_parameters,
                trained,
                trained / planned.num_base_parameters,
                planned.num_parameters * MASTER_BYTES,
                round(state),
            )
        )
    return rows


def num_parameters(model: "nn.Module") -> int:
    """Return how many parameters a model has; what several modules share counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def quantisable(model: "nn.Module") -> dict[str, int]:
    """Return path -> numbers of the weights that QLoRA stores in 4 bits, by the rule of `quantize_linears`."""
    return {path: layer.weight.numel() for path, layer in split_linears(model)[0].items()}
