"""Settings of what a run minimises: one class for each objective, told apart by `kind`. Loads no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from luthier.core.settings import Settings

DEFAULT_BETA = {"simpo": 2.0}
"""Where it is not 0.1: SimPO's rewards are means over tokens, which are smaller than sums by an answer's length."""
WITHOUT_REFERENCE = ("simpo", "orpo")


class SftSettings(Settings):
    """Supervised fine-tuning: the likelihood of the answers. It has no settings of its own."""

    kind: Literal["sft"] = Field(default="sft", description="supervised fine-tuning")


class DpoSettings(Settings):
    """Learning from pairs of answers of which one is better, without a reward model."""

    kind: Literal["dpo"] = Field(default="dpo", description="preferences between two answers")
    loss: Literal["sigmoid", "robust", "ipo", "simpo", "orpo"] = Field(
        "sigmoid",
        description="sigmoid: DPO itself; robust: DPO corrected for labels that are wrong; ipo: a squared distance, which does "
        "not push without end; simpo and orpo: without a reference, by the mean log-probability of a token",
    )
    beta: float = Field(
        0.1,
        gt=0,
        allow_inf_nan=False,
        description="how strongly the model is held to the reference (tau of IPO), scale of SimPO's rewards, weight of ORPO's "
        "odds ratio; default 0.1, with simpo 2.0",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of pairs believed to be the wrong way round; for sigmoid, robust and simpo"
    )
    gamma: float = Field(0.5, ge=0, allow_inf_nan=False, description="simpo: the margin by which the better answer should win")

    @model_validator(mode="before")
    @classmethod
    def _beta_of_the_loss(cls, given: Any) -> Any:
        return {"beta": DEFAULT_BETA.get(str(given.get("loss")), 0.1)} | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.label_smoothing and self.loss in ("ipo", "orpo"):
            raise ValueError(f"label_smoothing has no effect with the loss {self.loss!r}; leave it out")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("the loss 'robust' corrects for label_smoothing, which is 0; say how many pairs are wrong")
        if self.gamma != type(self).model_fields["gamma"].default and self.loss != "simpo":
            raise ValueError(f"gamma has no effect with the loss {self.loss!r}; leave it out")
        return self


class KtoSettings(Settings):
    """Learning from answers marked good or bad, each by itself."""

    kind: Literal["kto"] = Field(default="kto", description="answers marked good or bad")
    beta: float = Field(0.1, gt=0, allow_inf_nan=False, description="how strongly the model is held to the reference")
    desirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight of good answers")
    undesirable_weight: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight of bad answers")


class RewardSettings(Settings):
    """A reward model: a score for an answer, learnt from pairs. The score's head is saved with the adapter."""

    kind: Literal["reward"] = Field(default="reward", description="a reward model from pairs")


ObjectiveSettings = Annotated[SftSettings | DpoSettings | KtoSettings | RewardSettings, Field(discriminator="kind")]
