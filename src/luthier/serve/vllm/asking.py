"""A request in vLLM's words, and its answer in the engine's: what /v1/completions takes and what its stream says.

Tokens go in and tokens come out. Which of them end an answer, and what text they are, is decided here as the embedded engine does
it, so that an answer is the same whichever engine made it. Log-probabilities are vLLM's: of the model's own distribution, before
temperature and penalties.
"""

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator
from typing import Any

from luthier.core.errors import EngineError
from luthier.engine.jobs import Event
from luthier.engine.requests import Completion, Constraint, FinishReason, Sampling, TokenLogprob
from luthier.engine.text import TextStream

DATA = "data: "
DONE = "[DONE]"


def body_of(
    model: str, prompt_ids: tuple[int, ...], sampling: Sampling, stop_ids: Collection[int], salt: str | None
) -> dict[str, Any]:
    """Return the body of a request. `stop_ids` are all tokens that end the answer; `salt` parts the prefix cache."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompt_ids),
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "ignore_eos": True,  # the tokens that end it are named, and no others count
        "stop_token_ids": sorted(stop_ids),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "add_special_tokens": False,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.constraint is not None:
        body["structured_outputs"] = structured(sampling.constraint)
    if salt:
        body["cache_salt"] = salt
    return body


def structured(constraint: Constraint) -> dict[str, Any]:
    """Return a constraint as vLLM's structured_outputs; its backend is the same library, llguidance."""
    (given,) = constraint.model_dump(exclude_none=True).items()
    name, value = given
    return {"json": value} if name == "json_schema" else {name: list(value) if name == "choice" else value}


class Answer:
    """One answer as it comes. `events` turns the stream's chunks into events, and stops reading where the answer ends."""

    def __init__(self, tokenizer: Any, prompt_ids: tuple[int, ...], sampling: Sampling, stop_ids: Collection[int]):
        self.prompt_ids, self.sampling, self.stop_ids = prompt_ids, sampling, frozenset(stop_ids)
        self._text = TextStream(tokenizer, sampling.stop, self.stop_ids)
        self._said: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._cached = 0
        self._began = time.monotonic()
        self._first: float | None = None

    async def events(self, lines: AsyncIterator[str]) -> AsyncGenerator[Event, None]:
        """Yield the answer; the last event holds the completion. Raises: EngineError where the stream breaks off."""
        ended: Event | None = None
        async for chunk in _chunks(lines):
            if usage := chunk.get("usage"):
                self._cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            for choice in chunk.get("choices") or ():
                event = self._event(choice)
                if event.completion is not None:
                    ended = event
                elif ended is None:
                    yield event
            if ended is not None and not self._awaits_usage(chunk):
                break
        if ended is None:
            raise EngineError("vLLM's answer broke off before its end")
        assert ended.completion is not None
        yield Event(ended.text, ended.token_ids, ended.logprobs, self._completion(ended.completion.finish_reason))

    def _awaits_usage(self, chunk: dict[str, Any]) -> bool:
        """vLLM has ended the answer too, so that its last word, the usage, is on its way."""
        return any(choice.get("finish_reason") for choice in chunk.get("choices") or ())

    def _event(self, choice: dict[str, Any]) -> Event:
        """What a chunk adds."""
        text: list[str] = []
        tokens: list[int] = []
        logprobs: list[TokenLogprob] = []
        reason: FinishReason | None = None
        for token, logprob in zip(choice.get("token_ids") or (), _logprobs(choice, self.sampling), strict=False):
            if self._first is None:
                self._first = time.monotonic()
            if token in self.stop_ids:
                reason = "stop"
                break
            tokens.append(token)
            logprobs += [logprob] if logprob is not None else []
            piece = self._text.push(token)
            text.append(piece.text)
            if piece.finished is not None:
                reason = piece.finished
                break
            if len(self._tokens) + len(tokens) == self.sampling.max_new_tokens:
                reason = "length"
                break
        told = choice.get("finish_reason")
        if reason is None and told is not None:
            if told not in ("stop", "length"):
                raise EngineError(f"vLLM ended this answer: {told}")
            reason = "stop" if told == "stop" else "length"
        if reason is not None:
            text.append(self._text.flush())
        self._said += text
        self._tokens += tokens
        self._logprobs += logprobs
        return Event("".join(text), tuple(tokens), tuple(logprobs), self._completion(reason) if reason is not None else None)

    def _completion(self, reason: FinishReason) -> Completion:
        now = time.monotonic()
        return Completion(
            text="".join(self._said),
            token_ids=tuple(self._tokens),
            finish_reason=reason,
            prompt_tokens=len(self.prompt_ids),
            cached_tokens=self._cached,
            logprobs=tuple(self._logprobs) if self.sampling.logprobs is not None else None,
            first_token_seconds=None if self._first is None else self._first - self._began,
            seconds=now - self._began,
        )


async def _chunks(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The documents of a stream of server-sent events. Raises: EngineError for one that is an error."""
    async for line in lines:
        if not line.startswith(DATA) or line == DATA + DONE:
            continue
        chunk = json.loads(line.removeprefix(DATA))
        if "error" in chunk:
            raise EngineError(f"vLLM failed: {chunk['error'].get('message', chunk['error'])}")
        yield chunk


def _logprobs(choice: dict[str, Any], sampling: Sampling) -> Iterator[TokenLogprob | None]:
    """One for each token of a chunk; vLLM writes tokens as 'token_id:123'."""
    told = choice.get("logprobs")
    if not told:
        while True:
            yield None
    for name, value, others in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        likeliest = sorted(((_token(other), each) for other, each in (others or {}).items()), key=lambda item: -item[1])
        yield TokenLogprob(_token(name), value, tuple(likeliest[: sampling.logprobs]))


def _token(name: str) -> int:
    return int(name.removeprefix("token_id:"))
