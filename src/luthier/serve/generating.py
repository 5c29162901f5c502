"""What both generating routes do alike: the context's room, the answers' beginning, headers and usage."""

import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from fastapi import Request

from luthier import __version__
from luthier.engine.requests import Completion, Sampling
from luthier.registry.view import Caller
from luthier.serve.answers import Part, together
from luthier.serve.bodies import MOST_ANSWERS, PromptDetails, Usage
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway, Route


@dataclass(frozen=True)
class Head:
    """What all chunks of an answer have in common. `version` names what answered: an adapter's version, or the base."""

    id: str
    model: str
    version: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, kind: str, gateway: Gateway, route: Route) -> "Head":
        """Return the head of a new answer; `kind` begins its id."""
        version = route.adapter or gateway.settings.served_name
        weights = route.version.manifest_digest if route.version is not None else None
        # Who gets another fingerprint may get other tokens for the same seed: other weights, or another program.
        known = "\n".join((gateway.settings.served_name, weights or version, __version__))
        fingerprint = f"fp_{hashlib.sha256(known.encode()).hexdigest()[:12]}"
        return cls(f"{kind}-{secrets.token_hex(12)}", route.model, version, fingerprint)

    def chunk(self, kind: str, *, has_usage: bool) -> dict[str, Any]:
        """Return what each chunk of a stream says; where the last one has the usage, the others say that they have none."""
        told = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return told | {"system_fingerprint": self.fingerprint} | ({"usage": None} if has_usage else {})

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers."""
        return {"x-luthier-version": quote(self.version, safe="/:@ ")}


def routed(gateway: Gateway, caller: Caller, request: Request, name: str, user: str | None) -> Route:
    """Return what answers a request: an experiment's arm by its user, its X-Session-Id or its tenant. Raises: ApiError."""
    unit = gateway.unit_of(caller, name, user=user, session=request.headers.get("x-session-id"))
    return gateway.route(caller, name, unit=unit)


def room_for(asked: int | None, default: int, prompts: Sequence[tuple[int, ...]], room: int, param: str) -> int:
    """Return how many tokens each answer may have: those asked for, else `default` or what the longest prompt leaves.

    Raises: ApiError 400 (context_length_exceeded) where prompt and answer have no room in the model's context of `room` tokens.
    """
    longest = max(map(len, prompts))
    wanted = longest + (asked or 1)
    if wanted > room:
        answer = f"and {asked} are asked for the answer" if asked else "and the answer needs at least one more"
        raise ApiError(
            400,
            f"This model's context has room for {room} tokens. The prompt has {longest}, {answer}: {wanted} in all. Shorten the "
            + ("prompt, or ask for fewer." if asked else "prompt."),
            param=param,
            code="context_length_exceeded",
        )
    return asked or min(default, room - longest)


def answers(
    gateway: Gateway,
    caller: Caller,
    route: Route,
    prompts: Sequence[tuple[int, ...]],
    samplings: Sequence[Sampling],
    id: str,
) -> AsyncGenerator[Part, None]:
    """Yield the parts of one answer for each prompt and sampling, those of the first prompt first by index.

    The first one is written down under `id`, and the others under that with their number.

    Raises: ApiError 400 for too many, and what the gateway raises.
    """
    number = len(prompts) * len(samplings)
    if number > MOST_ANSWERS:
        raise ApiError(
            400, f"{len(prompts)} prompts times n={len(samplings)} are {number} answers; at most {MOST_ANSWERS} may be."
        )
    asked = [(prompt, how, place > 0) for prompt in prompts for place, how in enumerate(samplings)]
    return together(
        [
            gateway.stream(caller, route, prompt, how, request_id=f"{id}.{number}" if number else id, is_further=is_further)
            for number, (prompt, how, is_further) in enumerate(asked)
        ]
    )


def usage_of(done: Sequence[Completion], number: int) -> Usage:
    """Return what some answers took; of `number` answers to one prompt it counts once."""
    prompts = done[::number]
    prompt_tokens = sum(each.prompt_tokens for each in prompts)
    completion_tokens = sum(len(each.token_ids) for each in done)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(each.cached_tokens for each in prompts)),
    )
