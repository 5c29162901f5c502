"""Load on a server of OpenAI's API: clients that ask again as soon as they are answered, and what they saw.

Each client has dice of its own, so the same seed asks the same of the same models, whatever the server's speed.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from luthier.core.errors import RemoteError
from luthier.core.settings import Settings
from luthier.serve.client import Chunk, Client, Message

Ended = Literal["answered", "left", "refused", "failed"]
SHARES = (0.5, 0.95, 0.99)


class LoadSettings(Settings):
    """What the clients do."""

    clients: int = Field(default=8, ge=1, description="clients at a time")
    requests: int | None = Field(default=None, ge=1, description="requests in all; None: until the time is over")
    seconds: float | None = Field(default=None, gt=0, description="no request begins later; None: until the requests are done")
    max_tokens: int = Field(default=64, ge=1, description="longest answer, in tokens")
    temperature: float = Field(default=0.0, ge=0, le=2, description="0: the likeliest token each time")
    zipf: float = Field(default=0.0, ge=0, description="exponent of Zipf's law over the models as they are listed; 0: all alike")
    leave: float = Field(default=0.0, ge=0, le=1, description="share of requests whose client leaves in the middle of the answer")
    hang_up: float = Field(default=0.0, ge=0, le=1, description="share whose client leaves before the first token")
    pause_seconds: float = Field(default=0.2, ge=0, description="how long a client waits after a 429")
    seed: int = Field(default=0, description="of the dice")


@dataclass
class Asked:
    """One request: what it was, how it ended, and when (time.perf_counter)."""

    model: str
    prompt: int
    sent: float
    ended: Ended = "answered"
    status: int | None = 200
    error: str | None = None
    first: float | None = None
    last: float | None = None
    tokens: int = 0
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What came of the answer."""
        return "".join(self.texts)


async def run_load(
    client: Client,
    models: Sequence[str],
    prompts: Sequence[Sequence[Message]],
    load: LoadSettings,
    *,
    on_end: Callable[[Asked], None] | None = None,
    keeps_text: bool = False,
) -> list[Asked]:
    """Ask until all requests are done or the time is over; return them in the order of their ends.

    `on_end` is called with each. What is asked of whom is drawn: a prompt evenly, a model by `load.zipf`.
    """
    weights = [1 / rank**load.zipf for rank in range(1, len(models) + 1)]
    begin, left = time.perf_counter(), load.requests
    done: list[Asked] = []

    async def one(dice: random.Random) -> bool:
        """Ask once; return whether the client goes on."""
        nonlocal left
        if (left is not None and left <= 0) or (load.seconds is not None and time.perf_counter() - begin >= load.seconds):
            return False
        left = None if left is None else left - 1
        [model], prompt = dice.choices(models, weights), dice.randrange(len(prompts))
        fate = dice.random()
        patience = None  # in pieces of text
        if fate < load.hang_up:
            patience = 0
        elif fate < load.hang_up + load.leave:
            patience = dice.randint(1, max(1, load.max_tokens // 2))
        asked = Asked(model, prompt, time.perf_counter())
        await _ask(client, asked, prompts[prompt], load, patience, dice)
        if not keeps_text:
            asked.texts.clear()
        done.append(asked)
        if on_end is not None:
            on_end(asked)
        if asked.status == 429:
            await asyncio.sleep(load.pause_seconds)
        return True

    async def client_of(number: int) -> None:
        dice = random.Random(f"{load.seed}/{number}")
        while await one(dice):
            pass

    await asyncio.gather(*(client_of(number) for number in range(load.clients)))
    return done


async def _ask(
    client: Client, asked: Asked, messages: Sequence[Message], load: LoadSettings, patience: int | None, dice: random.Random
) -> None:
    """Ask, and leave after `patience` pieces of text; 0: at a moment that is drawn, most likely before the first."""
    stream = client.chat(messages, asked.model, max_tokens=load.max_tokens, temperature=load.temperature)
    try:
        async with aclosing(stream):
            if patience == 0:
                await _hang_up(stream, dice)
                asked.ended = "left"
                return
            async for chunk in stream:
                if chunk.text:
                    asked.last = time.perf_counter()
                    asked.first = asked.first or asked.last
                    asked.texts.append(chunk.text)
                if chunk.usage:
                    asked.tokens = chunk.usage["completion_tokens"]
                if patience is not None and len(asked.texts) >= patience:
                    asked.ended, asked.tokens = "left", len(asked.texts)
                    return
    except RemoteError as error:
        asked.ended = "refused" if error.status is not None else "failed"
        asked.status, asked.error = error.status, str(error)


async def _hang_up(stream: AsyncGenerator[Chunk, None], dice: random.Random) -> None:
    waiting = asyncio.ensure_future(anext(stream))
    await asyncio.wait({waiting}, timeout=dice.random() * 0.2)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting


def summary(done: Sequence[Asked], seconds: float) -> dict[str, Any]:
    """Return what is to be told of a load: requests by how they ended, percentiles in seconds, tokens/s.

    `first_token` is from the request to the first text, `token` for each further token, `request` to the last text.
    """
    whole = [each for each in done if each.ended == "answered" and each.first is not None and each.last is not None]
    spans = {
        "first_token": [each.first - each.sent for each in whole if each.first is not None],
        "token": [
            (each.last - each.first) / (each.tokens - 1)
            for each in whole
            if each.tokens > 1 and each.first is not None and each.last is not None
        ],
        "request": [each.last - each.sent for each in whole if each.last is not None],
    }
    return {
        "requests": len(done),
        "seconds": seconds,
        "ended": dict(Counter(each.ended for each in done)),
        "statuses": dict(Counter(str(each.status) for each in done if each.ended in ("refused", "failed"))),
        "models": len({each.model for each in done}),
        "tokens": sum(each.tokens for each in done),
        "tokens_per_s": sum(each.tokens for each in done) / seconds if seconds else None,
        **{f"{name}_s": percentiles(values) for name, values in spans.items()},
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Return p50, p95 and p99 by nearest rank; None where there is nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {f"p{share * 100:.0f}": ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in SHARES}


def made_up_prompts(count: int, words: int, seed: int) -> list[list[Message]]:
    """Return prompts of random words, so that no two begin alike; about `words` long, from half to one and a half times."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        length = max(1, round(words * dice.uniform(0.5, 1.5)))
        said = " ".join("".join(dice.choices("aeioulnrst", k=dice.randint(2, 8))) for _ in range(length))
        found.append([{"role": "user", "content": said}])
    return found
