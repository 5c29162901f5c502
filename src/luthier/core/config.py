"""LoraConfig: which layers get an adapter, and of what size. Field names and meanings are PEFT's (docs/coming-from-peft.md)."""

import math
import re
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from luthier.core.errors import did_you_mean
from luthier.core.methods import INIT_NAMES, LOFTQ, is_known_init
from luthier.core.settings import Settings

ALL_LINEAR = "all-linear"


class EvaConfig(Settings):
    """How init 'eva' moves ranks between layers. Their sum stays; a layer may end with none, and then has no pair."""

    rho: float = Field(2.0, ge=1, allow_inf_nan=False, description="a layer gets rho times its rank at most; 1: no rank moves")
    adjust_scaling_factors: bool = Field(
        True, description="lora_alpha grows and shrinks with a layer's rank, so that alpha / r stays what it was"
    )


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
    init_lora_weights: bool | str = Field(
        True,
        description="True: kaiming-uniform A, zero B; 'gaussian': normal A with std 1/r, zero B; False: both random; "
        "'orthogonal', 'olora', 'pissa', 'pissa_niter_<number>', 'eva': see `luthier methods`; 'loftq': see loftq_config",
    )
    rank_pattern: dict[str, int] = Field(default_factory=dict, description="regular expression -> r for matching layers")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="regular expression -> lora_alpha")
    layers_to_transform: list[int] | int | None = Field(None, description="adapt only the blocks with these indices")
    layers_pattern: list[str] | str | None = Field(None, description="name of the block list, where the index follows it")
    modules_to_save: list[str] | None = Field(None, description="modules trained and saved whole, beside the pairs")
    task_type: str | None = Field(None, description="PEFT's task type; kept for the file")
    base_model_name_or_path: str | None = Field(None, description="where the base came from; informational")
    revision: str | None = Field(None, description="revision of the base; informational")
    lora_bias: bool = Field(False, description="give lora_B a bias of its own, scaled like the update")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        None, description="tokens whose rows of the input embeddings are trained, or module name -> such tokens"
    )
    use_dora: bool = Field(False, description="train a magnitude for each output too (DoRA, arXiv:2402.09353)")
    ensure_weight_tying: bool = Field(
        False, description="modules of modules_to_save that share a weight in the base (a tied head) share the trained one too"
    )
    target_parameters: list[str] | None = Field(
        None,
        description="parameters of 2 or 3 axes to adapt themselves, by the last parts of their paths, such as "
        "'experts.down_proj': the stacked weights of experts, which belong to no layer",
    )
    eva_config: EvaConfig | None = Field(
        None, description="with init 'eva': move ranks to layers whose inputs vary in more directions; without it none moves"
    )
    loftq_config: dict[str, int] = Field(
        default_factory=dict,
        description="of init 'loftq', where the base goes into 4 bits as the adapter is attached: loftq_iter, how often weight "
        "and pair are fitted to each other (1); loftq_bits (4)",
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _init_is_known(cls, init: bool | str) -> bool | str:
        if not is_known_init(init):
            raise ValueError(
                f"there is no such init.{did_you_mean(str(init), INIT_NAMES)} Known: true, false, {', '.join(INIT_NAMES)}"
            )
        return init

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
    def _loftq_is_complete(self) -> Self:
        given = self.loftq_config
        if given and self.init_lora_weights != LOFTQ:
            raise ValueError(f"loftq_config has no effect without init_lora_weights='{LOFTQ}'")
        if unknown := given.keys() - {"loftq_bits", "loftq_iter"}:
            raise ValueError(f"loftq_config has loftq_bits and loftq_iter, and no {', '.join(sorted(unknown))}")
        if given.get("loftq_bits", 4) != 4:
            raise ValueError(f"loftq_bits is {given['loftq_bits']}; weights are stored in 4 bits here")
        if given.get("loftq_iter", 1) < 1:
            raise ValueError(f"loftq_iter is {given['loftq_iter']}, and must be at least 1")
        return self

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
        others = (self.modules_to_save, self.trainable_token_indices, self.target_parameters)
        if not self.target_modules and not any(others):
            raise ValueError("target_modules is empty and modules_to_save too: nothing would be trained")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform has an effect only where target_modules is a list of names; "
                "put the indices into the regular expression, or list the names"
            )
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"lora_bias starts at zero or random; init_lora_weights must be True or False, not {self.init_lora_weights!r}"
            )
        if self.lora_bias and self.use_dora:
            raise ValueError("lora_bias has no place in use_dora, which rescales the weight alone; leave one of them out")
        if self.eva_config is not None and self.init_lora_weights != "eva":
            raise ValueError("eva_config has an effect only with init_lora_weights = 'eva'")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")
        return self

    @model_validator(mode="after")
    def _parameters_can_be_adapted(self) -> Self:
        if not self.target_parameters:
            return self
        faults = []
        if self.lora_dropout:
            faults.append("lora_dropout: the update is part of a weight, which never meets an input of its own")
        if self.lora_bias:
            faults.append("lora_bias: a parameter has no output to which a bias could be added")
        if self.use_dora:
            faults.append("use_dora: its magnitude is one number for each output of a layer")
        if self.bias != "none":
            faults.append(f"bias='{self.bias}': which biases belong to a parameter cannot be told")
        if faults:
            raise ValueError("target_parameters do not go together with " + "; with ".join(faults))
        return self


class AdaLoraConfig(LoraConfig):
    """An adapter whose ranks move, while it is trained, to the layers where they count.

    Every layer begins with `init_r` triplets; after training `target_r` of them are left on average, none in some layers.
    The update of a layer is `scaling * lora_B @ diag(lora_E) @ lora_A` with `scaling = lora_alpha / (init_r + 1e-5)`.
    `r`, `use_rslora`, `use_dora`, `lora_bias` and `alpha_pattern` have no effect here and are refused.
    Zhang et al. 2023, arXiv:2303.10512.
    """

    NO_EFFECT: ClassVar[dict[str, str]] = {
        "r": "set init_r (of every layer at the start) and target_r (of a layer on average at the end)",
        "use_rslora": "the scaling is lora_alpha / init_r; for that of rsLoRA multiply lora_alpha by sqrt(init_r)",
        "use_dora": "its triplets have sizes, and no magnitude beside them",
        "lora_bias": "its lora_B has no bias of its own",
        "alpha_pattern": "lora_alpha is the same for all layers",
    }

    # One layer's mask instead of its rank: which of the init_r triplets are in the file.
    rank_pattern: dict[str, list[bool]] = Field(  # type: ignore[assignment]
        default_factory=dict, description="path of a layer + '.lora_E' -> which of its triplets are left; written after training"
    )
    peft_type: Literal["ADALORA"] = Field("ADALORA", description="the method; it is what chooses these settings in a file")
    target_r: int = Field(8, ge=1, description="triplets of a layer at the end, on average")
    init_r: int = Field(12, ge=1, description="triplets of every layer at the start")
    tinit: int = Field(0, ge=0, description="optimiser steps before the first triplet goes")
    tfinal: int = Field(0, ge=0, description="optimiser steps after the last triplet went")
    deltaT: int = Field(1, ge=1, description="optimiser steps between two allocations")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay rate of the running mean of the sensitivity")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay rate of the running mean of the sensitivity's uncertainty")
    orth_reg_weight: float = Field(
        0.5, ge=0, allow_inf_nan=False, description="weight of the penalty on factors that are not orthogonal; only in gradients"
    )
    total_step: int | None = Field(None, ge=1, description="optimiser steps of the whole training; a run fills in its own")

    @field_validator("rank_pattern", mode="before")
    @classmethod
    def _ranks_are_positive(cls, ranks: Any) -> Any:
        if isinstance(ranks, dict) and any(isinstance(each, int) for each in ranks.values()):
            raise ValueError("AdaLoRA finds the ranks, from init_r and target_r; here stand masks, written after training")
        return ranks

    @model_validator(mode="after")
    def _is_a_schedule(self) -> Self:
        faults = [f"{key} has no effect in AdaLoRA: {why}" for key, why in self.NO_EFFECT.items() if self._differs(key)]
        if not isinstance(self.init_lora_weights, bool):
            faults.append(f"init_lora_weights={self.init_lora_weights!r} has no effect in AdaLoRA; use True or False")
        if self.target_parameters:
            faults.append("target_parameters cannot be adapted by AdaLoRA, which is for Linear and Conv1D layers; use LoRA")
        if self.target_r > self.init_r:
            faults.append(f"target_r is {self.target_r}, more than init_r, {self.init_r}: ranks only go; raise init_r")
        if self.total_step is not None and self.tinit + self.tfinal >= self.total_step:
            faults.append(
                f"tinit + tfinal is {self.tinit + self.tfinal} of {self.total_step} optimiser steps, which leaves none for the "
                "ranks to move; lower them, or train for longer"
            )
        if odd := {key: len(mask) for key, mask in self.rank_pattern.items() if len(mask) != self.init_r}:
            faults.append(f"rank_pattern needs init_r={self.init_r} values for each layer; given: {odd}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _differs(self, key: str) -> bool:
        return bool(getattr(self, key) != LoraConfig.model_fields[key].get_default(call_default_factory=True))

    def mask_of(self, path: str) -> list[bool]:
        """Return which of the init_r triplets of the layer at `path` the adapter has."""
        return self.rank_pattern.get(f"{path}.lora_E", [True] * self.init_r)


PEFT_TYPES: dict[Any, type[LoraConfig]] = {"LORA": LoraConfig, "ADALORA": AdaLoraConfig}
"""PEFT's `peft_type` -> the configuration of that method."""
