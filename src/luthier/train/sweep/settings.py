"""SweepSettings and CurveSettings: what is searched, and for how long. Loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from luthier.core.config import ALL_LINEAR, AdaLoraConfig
from luthier.core.errors import ConfigError
from luthier.core.methods import LOFTQ
from luthier.core.settings import Settings
from luthier.train.settings import RunSettings

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rank = Annotated[int, Field(ge=1)]
RATE_FACTOR = 10.0
ATTENTION, MLP = "attention", "mlp"


class SweepSettings(Settings):
    """The search of `luthier sweep`: section [sweep] beside the settings of a run."""

    trials: int = Field(default=20, ge=2, description="runs at most, the one with the default settings not counted")
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="begin no further trial after so long")
    steps: int | None = Field(default=None, ge=1, description="optimiser steps of a trial; default: what [train] says")
    ranks: list[Rank] = Field(default=[4, 8, 16, 32], min_length=1, description="ranks to try, smallest first")
    learning_rate: tuple[Rate, Rate] | None = Field(
        default=None, description="lowest and highest; default: a tenth and ten times of train.learning_rate"
    )
    alpha_ratios: list[Rate] = Field(default=[1.0, 2.0, 4.0], min_length=1, description="lora_alpha as a multiple of r")
    targets: list[str | list[str]] | None = Field(
        default=None,
        min_length=1,
        description="choices of target_modules; 'attention' and 'mlp' are the linear layers inside and outside of attention. "
        "Default: all-linear and attention, or what lora.target_modules names",
    )
    pruner: Literal["median", "halving", "none"] = Field(
        default="median",
        description="end a trial early whose held-out loss is above the median of those before it (median), or not among "
        "the better half at steps that double (halving)",
    )
    min_gain: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="held-out loss per token that a higher rank must surely save (nats)"
    )
    eval_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the rows to compare trials on, where data.eval_path is not given"
    )
    test_path: str | None = Field(default=None, description="rows to check the recommendation on, which no trial sees")
    test_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the rows kept for that check, where test_path is not given"
    )
    seed: int = Field(default=0, ge=0, description="of the splits and of the proposals")

    @field_validator("ranks", "alpha_ratios", "targets")
    @classmethod
    def _once_each(cls, given: list | None) -> list | None:
        if given is not None and any(given.count(each) > 1 for each in given):
            raise ValueError("names one twice")
        return given

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.ranks != sorted(self.ranks):
            raise ValueError(f"ranks must rise, since the smallest is tried first; given: {self.ranks}")
        if self.learning_rate and self.learning_rate[0] >= self.learning_rate[1]:
            raise ValueError(f"learning_rate wants the lowest and a higher one; given: {list(self.learning_rate)}")
        return self

    @property
    def trials_of_a_rank(self) -> int:
        """How many trials each rank gets before it is compared with the next."""
        return max(2, self.trials // len(self.ranks))

    def completed(self, run: RunSettings) -> "SweepSettings":
        """Return the settings with what follows from the run's own filled in."""
        rate, named = run.train.learning_rate, run.lora.target_modules
        is_all = isinstance(named, str) and named.lower() == ALL_LINEAR
        return self.changed(
            learning_rate=self.learning_rate or (rate / RATE_FACTOR, rate * RATE_FACTOR),
            targets=self.targets or ([ALL_LINEAR, ATTENTION] if is_all else [named]),
        )


class CurveSettings(Settings):
    """The runs of `luthier learning-curve`."""

    shares: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.125, 0.25, 0.5, 1.0], min_length=3, description="shares of the rows to train on, smallest first"
    )
    repeats: int = Field(default=2, ge=1, description="runs of each share, each on rows and in an order of its own")
    worth: float = Field(
        default=0.01, ge=0, lt=1, description="what twice the rows must save to be worth it, as a share of the loss"
    )
    eval_fraction: float = Field(
        default=0.15, gt=0, lt=1, description="share of the rows that is held out, where data.eval_path is not given"
    )
    seed: int = Field(default=0, ge=0, description="of the split and of the shares")

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.shares != sorted(set(self.shares)):
            raise ValueError(f"shares must rise, each once; given: {self.shares}")
        if len(self.shares) * self.repeats < 4:
            raise ValueError("three numbers are fitted, so four runs are needed at least: name more shares, or raise repeats")
        return self


def check_run(run: RunSettings, purpose: str) -> None:
    """Raise ConfigError, with all faults listed, where runs like this cannot be made over one base and compared row by row."""
    faults = []
    kind: str = run.objective.kind
    if kind != "sft":
        faults.append(f"objective is {kind!r}; answers' losses are compared row by row, which only 'sft' has")
    if run.adapter is not None:
        faults.append("adapter continues one that has its rank and targets; leave it out")
    if run.train.processes not in (None, 1) or run.train.shard != "none":
        faults.append("train.processes and train.shard spread a run over processes; here all runs are made in one")
    if run.train.full:
        faults.append("train.full trains every weight; it has no rank, and cannot be taken out of the base")
    if run.lora.init_lora_weights == LOFTQ:
        faults.append("init 'loftq' changes the base, which all runs here share; use another init")
    if isinstance(run.lora, AdaLoraConfig) or run.lora.rank_pattern or run.lora.alpha_pattern:
        faults.append("AdaLoRA, rank_pattern and alpha_pattern choose ranks themselves; leave them out")
    if faults:
        raise ConfigError(f"{purpose} cannot work with these settings:\n" + "\n".join(f"  {fault}" for fault in faults), faults)
