"""What a run minimises: each objective reads its own kind of rows and sums its own loss; the loop is the same for all."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from luthier.train.objectives.base import Objective

OBJECTIVES = {
    "sft": "luthier.train.objectives.sft:Sft",
    "dpo": "luthier.train.objectives.dpo:Dpo",
    "kto": "luthier.train.objectives.kto:Kto",
    "reward": "luthier.train.objectives.reward:Reward",
    "grpo": "luthier.train.objectives.grpo:Grpo",
    "ppo": "luthier.train.objectives.ppo:Ppo",
}
"""Kind -> module and class. Named, not imported: settings are read without torch."""


def objective_class(kind: str) -> "type[Objective]":
    """Return the class of the objective of this kind."""
    module, name = OBJECTIVES[kind].split(":")
    found: type[Objective] = getattr(import_module(module), name)
    return found
