"""Settings of what a run minimises: one class for each objective, told apart by `kind`. Loads no torch."""

from typing import Literal

from pydantic import Field

from luthier.core.settings import Settings


class SftSettings(Settings):
    """Supervised fine-tuning: the likelihood of the answers. It has no settings of its own."""

    kind: Literal["sft"] = Field(default="sft", description="supervised fine-tuning")


ObjectiveSettings = SftSettings
