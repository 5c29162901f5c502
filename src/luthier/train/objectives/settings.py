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


class RewardSource(Settings):
    """Where a reward comes from: exactly one of a function, a command, and what is built in."""

    function: str | None = Field(
        default=None, description="file.py:name of a function of (prompt, completion, row), or of (prompts, completions, rows)"
    )
    command: str | None = Field(
        default=None, description="a command that reads answers as JSON lines and writes a number for each line"
    )
    valid_json: tuple[str, ...] | None = Field(
        default=None, description="1 for a JSON object that has these keys and no others ([]: whatever keys), else 0"
    )
    regex: str | None = Field(default=None, description="1 for an answer that this regular expression matches whole, else 0")
    exact_match: str | None = Field(
        default=None, description="Jinja template over a row's columns: 1 for this very answer, spaces at its ends aside, else 0"
    )
    max_length: int | None = Field(
        default=None, ge=1, description="1 for an answer of so many characters or less, falling to 0 at twice as many"
    )
    weight: float = Field(default=1.0, allow_inf_nan=False, description="what it is multiplied by before rewards are added up")
    timeout: float = Field(default=60.0, gt=0, description="seconds that a command may take over all answers of a step")

    @property
    def name(self) -> str:
        """What it is called in the log."""
        if self.function is not None:
            return self.function.rpartition(":")[2]
        return next(key for key in SOURCES if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [key for key in SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"a reward comes from exactly one of {', '.join(SOURCES)}; given: {', '.join(given) or 'none'}")
        if self.timeout != type(self).model_fields["timeout"].default and self.command is None:
            raise ValueError(f"timeout has no effect on {given[0]}, which is no command; leave it out")
        return self


SOURCES = ("function", "command", "valid_json", "regex", "exact_match", "max_length")


class RolloutSettings(Settings):
    """What objectives share that learn from rewards of the model's own answers."""

    rewards: tuple[RewardSource, ...] = Field(description="what answers are judged by; rewards are added up by their weights")
    num_generations: int = Field(default=1, ge=1, description="answers to each prompt")
    prompts: int = Field(default=8, ge=1, description="prompts that each process answers for one optimiser step")
    max_new_tokens: int = Field(default=256, ge=1, description="tokens that an answer may have")
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of sampling; log-probabilities are taken at it too"
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="sample only from the likeliest tokens that add up to this")
    iterations: int = Field(default=1, ge=1, description="optimiser steps that are made with the answers of one sampling")
    rollouts: Literal["auto", "engine", "model"] = Field(
        default="auto",
        description="who answers: the engine, many at a time from weights laid out for reading (a copy of them), or the model "
        "that is trained; auto: the engine where it knows the architecture and the base is not in 4 bits",
    )

    @model_validator(mode="after")
    def _is_rewarded(self) -> Self:
        if not self.rewards:
            raise ValueError("rewards is empty, so there is nothing to learn; name a function, a command or one that is built in")
        names = [source.name for source in self.rewards]
        if double := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"rewards of one name cannot be told apart in the log: {', '.join(double)}")
        return self


class GrpoSettings(RolloutSettings):
    """Learning from rewards, each answer compared with others to the same prompt."""

    kind: Literal["grpo"] = Field(default="grpo", description="rewards of answers, compared within a group")
    num_generations: int = Field(default=8, ge=2, description="answers to each prompt: a group")
    loss: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        default="dapo",
        description="dapo, bnpo: each token counts the same; grpo: each answer; dr_grpo: each token, over max_new_tokens",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        default="group", description="what an advantage is divided by: the standard deviation of its group, of the step, nothing"
    )
    beta: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="weight of the divergence from the reference; 0: there is none"
    )
    unbiased_kl: bool = Field(
        default=True, description="the divergence is weighed by a token's ratio, so that its gradient has no bias"
    )
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="how far a token's ratio may count away from 1")
    epsilon_high: float | None = Field(default=None, gt=0, allow_inf_nan=False, description="the same upwards; default: epsilon")

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        fields = type(self).model_fields
        if not self.unbiased_kl and not self.beta:
            raise ValueError("unbiased_kl has no effect without beta; leave it out")
        given = [key for key in ("epsilon", "epsilon_high") if getattr(self, key) != fields[key].default]
        if given and self.iterations == 1:
            raise ValueError(
                f"{' and '.join(given)} would have no effect: with iterations = 1 each step has answers of its own, and every "
                "ratio is 1; leave it out, or set iterations"
            )
        return self


class PpoSettings(RolloutSettings):
    """Learning from rewards with a learnt estimate of what is to be expected at each token."""

    kind: Literal["ppo"] = Field(default="ppo", description="rewards of answers, against a learnt value of each token")
    iterations: int = Field(default=4, ge=1, description="optimiser steps that are made with the answers of one sampling")
    kl_coef: float = Field(
        default=0.05, ge=0, allow_inf_nan=False, description="what a nat of log-ratio to the reference costs, at each token"
    )
    epsilon: float = Field(default=0.2, gt=0, lt=1, description="how far a token's ratio may count away from 1")
    value_clip: float = Field(default=0.2, gt=0, allow_inf_nan=False, description="how far a value may count from its old one")
    value_coef: float = Field(default=0.1, ge=0, allow_inf_nan=False, description="weight of the values' loss")
    gamma: float = Field(default=1.0, gt=0, le=1, description="what a reward is worth one token earlier")
    lam: float = Field(default=0.95, ge=0, le=1, description="lambda of GAE: 0 trusts the values, 1 the rewards")
    whiten: bool = Field(default=True, description="advantages are brought to mean 0 and variance 1 over the step")


ObjectiveSettings = Annotated[
    SftSettings | DpoSettings | KtoSettings | RewardSettings | GrpoSettings | PpoSettings, Field(discriminator="kind")
]
