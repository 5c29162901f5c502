"""What is asked of the engine and what it answers: plain data, checked when it is made. Loads no torch."""

from dataclasses import dataclass, field
from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeInt, model_validator

from luthier.core.settings import Settings

Mix = tuple[tuple[str, float], ...]
"""The adapters of a request with their weights, by the store's keys; () is the bare base."""

FinishReason = Literal["stop", "length", "cancelled", "error"]


class Constraint(Settings):
    """The form an answer must have; exactly one of these."""

    json_schema: dict[str, Any] | None = Field(default=None, description="a JSON document that this schema accepts")
    json_object: Literal[True] | None = Field(default=None, description="any JSON object")
    regex: str | None = Field(default=None, description="a text that this regular expression matches whole")
    choice: tuple[str, ...] | None = Field(default=None, description="one of these texts")
    grammar: str | None = Field(default=None, description="a text of this grammar, in Lark's notation")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a constraint is exactly one of {', '.join(type(self).model_fields)}; given: {given or 'none'}")
        if self.choice is not None and not (self.choice and all(self.choice)):
            raise ValueError("choice needs at least one text, and none of them empty")
        return self


class Sampling(Settings):
    """How an answer is drawn and when it ends. The defaults are greedy and change no logit."""

    max_new_tokens: int = Field(default=128, ge=1, description="the answer is cut off after so many tokens")
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="0: the likeliest token each time")
    top_p: float = Field(default=1.0, gt=0, le=1, description="only the likeliest tokens whose probabilities add up to this")
    top_k: int = Field(default=0, ge=0, description="only so many of the likeliest tokens; 0: all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="only tokens at least so likely as this share of the likeliest one")
    repetition_penalty: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="logits of tokens seen are divided by it"
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="taken off the logit of a token that the answer has")
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2, description="taken off for each time the answer has it")
    logit_bias: dict[NonNegativeInt, FiniteFloat] | None = Field(default=None, description="added to the logits of these tokens")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="repeats the draw, alone or in company")
    stop: tuple[str, ...] = Field(default=(), description="texts that end the answer, which comes without them")
    stop_token_ids: tuple[int, ...] = Field(default=(), description="tokens that end the answer, beside the model's own")
    ignore_eos: bool = Field(default=False, description="go on after the model's own stop tokens")
    logprobs: int | None = Field(default=None, ge=0, le=50, description="log-probabilities of the tokens and of so many others")
    constraint: Constraint | None = Field(default=None, description="the form the answer must have")

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if not all(self.stop):
            raise ValueError("a stop text is empty, which every answer begins with")
        drawing = [name for name in ("top_p", "top_k", "min_p", "seed") if getattr(self, name) != _default(name)]
        if self.temperature == 0.0 and drawing:
            idle = " and ".join(drawing)
            raise ValueError(f"{idle} would have no effect at temperature 0; give a temperature above 0 to sample")
        return self


def _default(name: str) -> Any:
    return Sampling.model_fields[name].default


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability (nats) of a token of the answer, and of the likeliest others in its place."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Completion:
    """An answer. `text` comes without the stop text, `token_ids` without the stop token; "length" means it was cut off.

    `stop_token` is the one that ended it, None where something else did. Seconds count from when the request was taken:
    `queue_seconds` until its prompt began to be read.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    queue_seconds: float | None = field(default=None, compare=False)
    first_token_seconds: float | None = field(default=None, compare=False)
    seconds: float | None = field(default=None, compare=False)
    error: str | None = None
    vector: tuple[float, ...] | None = field(default=None, compare=False)
    """What an embedding was asked for instead of an answer."""
    stop_token: int | None = field(default=None, compare=False)
