"""LoraConfig: which layers get an adapter, and of what size. Field names and meanings are PEFT's (docs/coming-from-peft.md)."""

import math
import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from luthier.core.settings import Settings

ALL_LINEAR = "all-linear"


class LoraConfig(Settings):
    """One adapter's shape.

    The update of a layer is `scaling * lora_B @ lora_A` with `scaling = lora_alpha / r`, or `lora_alpha / sqrt(r)` with
    `use_rslora` (Hu et al. 2021, arXiv:2106.09685, section 4.1; Kalajdzievski 2023, arXiv:2312.03732).
    """

    r: int = Field(8, ge=1, description="rank: the inner width of the pair")
    lora_alpha: float = Field(8, gt=0, allow_inf_nan=False, description="numerator of the scaling")
    target_modules: list[str] | str = Field(
        ALL_LINEAR,
        description="module names (exact, or the last part of the path), one regular expression over whole paths, "
        "or 'all-linear' for every linear layer but the output head",
    )
    exclude_modules: list[str] | str | None = Field(None, description="same matching; wins over target_modules")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the input of lora_A, while training")
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="train the biases of no layer, of every layer, or of the adapted layers"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r)")
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="True: kaiming-uniform A, zero B; 'gaussian': normal A with std 1/r, zero B; False: both random"
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="regular expression -> r for matching layers")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="regular expression -> lora_alpha")
    layers_to_transform: list[int] | int | None = Field(None, description="adapt only the blocks with these indices")
    layers_pattern: list[str] | str | None = Field(None, description="name of the block list, where the index follows it")
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved whole, beside the pairs")
    task_type: str | None = Field(None, description="PEFT's task type; kept for the file")
    base_model_name_or_path: str | None = Field(None, description="where the base came from; informational")
    revision: str | None = Field(None, description="revision of the base; informational")
    use_dora: bool = Field(False, description="train a magnitude for each output too (DoRA, arXiv:2402.09353)")

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_positive(cls, ranks: dict[str, int]) -> dict[str, int]:
        if bad := {key: r for key, r in ranks.items() if r < 1}:
            raise ValueError(f"ranks must be at least 1: {bad}")
        return ranks

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_are_positive(cls, alphas: dict[str, float]) -> dict[str, float]:
        if bad := {key: alpha for key, alpha in alphas.items() if not 0 < alpha < math.inf}:
            raise ValueError(f"alphas must be positive and finite: {bad}")
        return alphas

    @model_validator(mode="after")
    def _patterns_can_take_effect(self) -> Self:
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        expressions += [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        expressions += [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for expression in expressions:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        if not self.target_modules and not self.modules_to_save:
            raise ValueError("target_modules is empty and modules_to_save too: nothing would be trained")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform has an effect only where target_modules is a list of names; "
                "put the indices into the regular expression, or list the names"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
        return self
