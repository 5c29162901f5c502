"""POST /v1/completions: texts, or token ids, that go on."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal, Self

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, model_validator

from luthier.engine.requests import Completion, TokenLogprob
from luthier.serve.answers import EventStream, Part, begun, completions, unless_left
from luthier.serve.bodies import MOST_ANSWERS, Asked, TokenId, Usage
from luthier.serve.generating import Head, answers, room_for, routed, usage_of
from luthier.serve.prompts import Prompts
from luthier.serve.routing import CallerOf, GatewayOf, KeyFirstRoute, refusals
from luthier.serve.tokens import TokenTexts

router = APIRouter(route_class=KeyFirstRoute)
ANSWERS = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}, **refusals(404, 409, 413)}

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own for this route."""

Ids = Annotated[list[TokenId], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=MOST_ANSWERS)]
Input = str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=MOST_ANSWERS)]
"""One text or several, as they are or as token ids."""


class CompletionBody(Asked):
    """Texts that are to go on."""

    refused: ClassVar[dict[str, str]] = {"suffix": "text is only ever added at the end"}

    prompt: Input
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="16 where it is not given, as in OpenAI's API")
    logprobs: int | None = Field(default=None, ge=0, le=5, description="log-probabilities of the tokens, and of so many others")
    best_of: int | None = Field(default=None, ge=1, le=MOST_ANSWERS, description="the same as n, or left out")
    echo: Literal[False] | None = Field(default=None, description="the prompt is not repeated")
    suffix: None = None

    @model_validator(mode="after")
    def _returns_what_it_makes(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported beyond n: every answer that is made is returned")
        return self


class TextLogprobs(BaseModel):
    """Log-probabilities (nats) of a text's tokens; `text_offset` is where the text of each begins."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the answers."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """How the texts go on: `n` answers to the first, then `n` to the next."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str


async def ids_of(prompts: Prompts, given: Input) -> list[tuple[int, ...]]:
    """Return the token ids of one input or several."""
    if isinstance(given, str):
        return await prompts.encode([given])
    texts = [each for each in given if isinstance(each, str)]
    if texts:
        return await prompts.encode(texts)
    rows = [each for each in given if isinstance(each, list)]
    return [tuple(row) for row in rows] or [tuple(each for each in given if isinstance(each, int))]


@router.post("/v1/completions", response_model=TextCompletion, responses=ANSWERS)
async def complete(body: CompletionBody, request: Request, caller: CallerOf, gateway: GatewayOf) -> Response:
    """Continue texts."""
    route = routed(gateway, caller, request, body.model, body.user)
    prompts = await ids_of(gateway.prompts, body.prompt)
    longest = room_for(body.max_tokens, DEFAULT_MAX_TOKENS, prompts, await gateway.backend.room(), "prompt")
    constraint = None if body.structured_outputs is None else body.structured_outputs.constraint()
    samplings = body.samplings(longest, body.logprobs, constraint)
    head = Head.of("cmpl", gateway, route)
    source = answers(gateway, caller, route, prompts, samplings, head.id)
    texts = gateway.prompts.texts
    if body.stream:
        parts = await begun(source, request.receive)
        return EventStream(_chunks(parts, head, texts, body, len(samplings)), source, head.headers)
    done = await unless_left(request.receive, completions(source, len(prompts) * len(samplings)))
    answer = TextCompletion(
        id=head.id,
        created=head.created,
        model=head.model,
        choices=[
            TextChoice(
                index=index,
                text=each.text,
                logprobs=_logprobs(texts, each.logprobs or (), 0, body.logprobs),
                finish_reason=_reason(each),
            )
            for index, each in enumerate(done)
        ],
        usage=usage_of(done, len(samplings)),
        system_fingerprint=head.fingerprint,
    )
    return JSONResponse(answer.model_dump(), headers=head.headers)


async def _chunks(
    parts: AsyncGenerator[Part, None], head: Head, texts: TokenTexts, body: CompletionBody, number: int
) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the chunks of a stream."""
    common = head.chunk("text_completion", has_usage=body.wants_usage)
    done: dict[int, Completion] = {}
    offsets: dict[int, int] = {}
    async with aclosing(parts):
        async for part in parts:
            event = part.event
            if event.completion is not None:
                done[part.index] = event.completion
            elif not event.text and not event.logprobs:
                continue  # a token whose text is held back
            logprobs = _logprobs(texts, event.logprobs, offsets.get(part.index, 0), body.logprobs)
            if logprobs is not None:
                offsets[part.index] = offsets.get(part.index, 0) + sum(map(len, logprobs.tokens))
            choice = {
                "index": part.index,
                "text": event.text,
                "logprobs": None if logprobs is None else logprobs.model_dump(),
                "finish_reason": None if event.completion is None else _reason(event.completion),
            }
            yield {**common, "choices": [choice]}
    if body.wants_usage:
        whole = usage_of([done[index] for index in sorted(done)], number)
        yield {**common, "choices": [], "usage": whole.model_dump()}


def _logprobs(texts: TokenTexts, tokens: Sequence[TokenLogprob], offset: int, asked: int | None) -> TextLogprobs | None:
    return None if asked is None else TextLogprobs(**texts.in_columns(tokens, offset, asked))


def _reason(completion: Completion) -> Literal["stop", "length"]:
    return "length" if completion.finish_reason == "length" else "stop"
