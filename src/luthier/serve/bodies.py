"""What requests and answers of both generating routes have in common, as OpenAI's API spells it.

Nothing that a client sends is ignored in silence: a field is honoured, or has only the values that change nothing, or is
refused by name. The fields that OpenAI's API does not have are what users of engines know from vLLM.
"""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from luthier.core.errors import ConfigError, did_you_mean
from luthier.engine.requests import Constraint, Sampling

MOST_ANSWERS = 128
"""To one request: prompts times `n`."""

TINY = 1e-9
"""Stands for top_p = 0, which OpenAI's API knows: the likeliest token alone."""

COLD = 1e-5
"""A temperature below this is 0: the likeliest token is drawn all the same, and logits divided by less may be infinite."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
"""Each token of an answer is looked at for the beginning of one."""


class Body(BaseModel):
    """A part of a request. Unknown keys are refused with the near miss, values are of their very type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[dict[str, str]] = {}
    """Fields of OpenAI's API that are not supported, with the reason; null is taken."""

    @model_validator(mode="before")
    @classmethod
    def _is_known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = [field.alias or name for name, field in cls.model_fields.items()]
        for key in given:
            if key not in known:
                near = did_you_mean(str(key), known)
                raise PydanticCustomError(
                    "unknown_key", "Unknown parameter '{key}'.{near}", {"key": str(key)[:100], "near": near}
                )
            if key in cls.refused and given[key] is not None:
                raise PydanticCustomError(
                    "refused", "Parameter '{key}' is not supported: {why}.", {"key": key, "why": cls.refused[key]}
                )
        return given


class StreamOptions(Body):
    """What a stream brings beside the answer."""

    include_usage: bool | None = Field(default=None, description="a last chunk with the usage")
    include_obfuscation: Literal[False] | None = Field(default=None, description="chunks are never padded")


class StructuredOutputs(Body):
    """The form that the answer must have, as vLLM's field of that name: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="a JSON schema, or its text")
    json_object: Literal[True] | None = Field(default=None, description="any JSON object")
    regex: Text | None = Field(default=None, description="a regular expression that matches the whole answer")
    choice: Annotated[list[Text], Field(min_length=1)] | None = Field(default=None, description="one of these texts")
    grammar: Text | None = Field(default=None, description="a grammar in Lark's notation")

    def constraint(self) -> Constraint:
        """Return it in the engine's words. Raises: ConfigError."""
        schema: Any = self.json_
        if isinstance(schema, str):
            schema = _parsed(schema)
        choice = None if self.choice is None else tuple(self.choice)
        return Constraint(json_schema=schema, json_object=self.json_object, regex=self.regex, choice=choice, grammar=self.grammar)


class Asked(Body):
    """The fields of both routes."""

    model: str = Field(min_length=1, max_length=512, description="an adapter, an alias, a surface, or the base; see /v1/models")
    stream: bool | None = Field(default=None, description="answer in server-sent events, as the text is made")
    stream_options: StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=MOST_ANSWERS, description="so many answers, made at once")
    temperature: float | None = Field(default=None, ge=0, le=2, description="1 where it is not given; 0: the likeliest token")
    top_p: float | None = Field(default=None, ge=0, le=1, description="only the likeliest tokens that add up to this")
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="the same again; answer number i draws with seed + i"
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        default=None, description="texts that end the answer"
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=2048, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = Field(default=None, description="added to the logits of tokens, by their ids")
    user: str | None = Field(default=None, description="who asks, for sharing out a surface's experiment")
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="only so many of the likeliest tokens; 0 and -1: all")
    min_p: float | None = Field(default=None, ge=0, le=1, description="only tokens at least this share as likely as the first")
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100, description="logits of tokens seen are divided by it")
    ignore_eos: bool | None = Field(default=None, description="go on after the model's own stop tokens")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = Field(
        default=None, description="tokens that end the answer, beside the model's own"
    )
    structured_outputs: StructuredOutputs | None = Field(default=None, description="the form that the answer must have")

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options has no effect without stream=true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it took."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def samplings(self, max_new_tokens: int, logprobs: int | None, constraint: Constraint | None) -> list[Sampling]:
        """Return how each of the `n` answers is drawn. Raises: ConfigError."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": 1.0 if self.temperature is None else self.temperature if self.temperature >= COLD else 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
            "stop": stop,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "ignore_eos": bool(self.ignore_eos),
            "logprobs": logprobs,
            "constraint": constraint,
        }
        if settings["temperature"] > 0:  # at 0 all of these have their effect by themselves: it is the likeliest token
            settings |= {
                "top_p": 1.0 if self.top_p is None else max(self.top_p, TINY),
                "top_k": max(self.top_k or 0, 0),
                "min_p": self.min_p or 0.0,
            }
        how = Sampling(**settings)
        number = self.n or 1
        if settings["temperature"] == 0 or self.seed is None:
            return [how] * number
        return [how.changed(seed=(self.seed + each) % 2**63) for each in range(number)]


class PromptDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="tokens that had been read for an earlier request")


class Usage(BaseModel):
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def _parsed(schema: str) -> Any:
    try:
        found = json.loads(schema)
    except ValueError as error:
        raise ConfigError(f"structured_outputs.json is a text that is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("structured_outputs.json needs a JSON schema, which is an object")
    return found
