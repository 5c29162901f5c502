"""What a gateway and the engine's process say to each other: messages in JSON, each after its length in four bytes.

    to the engine      settings first; then  ask  cancel  call  close
    to the gateway     progress, then  ready | failed; then  parts (all that came since the last)  reply

JSON, so that nothing that comes over the socket can be more than data. Half of an answer's end, its whole text and tokens, is
what was sent before, and is put together on the gateway's side.
"""

import asyncio
import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any

from luthier.core import errors
from luthier.core.errors import EngineError, LuthierError
from luthier.engine.jobs import Event
from luthier.engine.requests import Completion, Sampling, TokenLogprob
from luthier.serve.backend import Ask

HEAD = struct.Struct("!I")
Message = dict[str, Any]
Part = list[Any]
"""[request's id, text, token ids, logprobs, None | {"completion": ...} | {"error": ...}]"""


def frame(message: Message) -> bytes:
    """Return a message as it is sent."""
    body = json.dumps(message, separators=(",", ":")).encode()  # in ASCII, so that half a character crosses too
    return HEAD.pack(len(body)) + body


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """Return the next message; None where the other side is gone, also in the middle of one."""
    try:
        [length] = HEAD.unpack(await reader.readexactly(HEAD.size))
        message: Message = json.loads(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return message


# --- requests ------------------------------------------------------------------------------------------------


def ask_message(ask: Ask) -> Message:
    """Return a request as a message."""
    sampling = ask.sampling.model_dump(mode="json", exclude_defaults=True)
    return {"kind": "ask", **dataclasses.asdict(ask), "sampling": sampling}


def read_ask(message: Mapping[str, Any]) -> Ask:
    """Return the request in a message."""
    return Ask(
        id=message["id"],
        prompt_ids=tuple(message["prompt_ids"]),
        adapter=message["adapter"],
        sampling=Sampling(**message["sampling"]),
        tenant=message["tenant"],
    )


# --- answers -------------------------------------------------------------------------------------------------


def part_of(id: str, event: Event, error: BaseException | None = None) -> Part:
    """Return an event of a request as a part of a message; with the last one, how it ended."""
    end: dict[str, Any] | None = None
    if error is not None:
        end = {"error": error_fields(error)}
    elif event.completion is not None:
        known = dataclasses.asdict(dataclasses.replace(event.completion, text="", token_ids=(), logprobs=None))
        end = {"completion": known | {"has_logprobs": event.completion.logprobs is not None}}
    logprobs = [[each.token, each.logprob, each.alternatives] for each in event.logprobs]
    return [id, event.text, event.token_ids, logprobs, end]


class Answer:
    """Puts the parts of one answer together again."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def event(self, part: Part) -> Event:
        """Return the event in the next part. Raises: what the request failed with."""
        _, text, token_ids, told, end = part
        if end is not None and "error" in end:
            raise error_of(end["error"])
        logprobs = tuple(TokenLogprob(token, value, tuple(map(tuple, others))) for token, value, others in told)
        self._texts.append(text)
        self._tokens += token_ids
        self._logprobs += logprobs
        return Event(text, tuple(token_ids), logprobs, None if end is None else self._whole(end["completion"]))

    def _whole(self, told: Mapping[str, Any]) -> Completion:
        known = {key: value for key, value in told.items() if key != "has_logprobs"}
        logprobs = tuple(self._logprobs) if told["has_logprobs"] else None
        return Completion(**known | {"text": "".join(self._texts), "token_ids": tuple(self._tokens), "logprobs": logprobs})


# --- errors --------------------------------------------------------------------------------------------------


def error_fields(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data: the name of its class in core/errors.py, its message, and what else it holds."""
    if not isinstance(error, LuthierError):  # a fault of the engine's, of which its log has the rest
        return {"class": "EngineError", "message": f"{type(error).__name__}: {error}", "fields": {}}
    fields = {key: value for key, value in vars(error).items() if isinstance(value, str | int | float | tuple)}
    return {"class": type(error).__name__, "message": str(error), "fields": fields}


def error_of(told: Mapping[str, Any]) -> LuthierError:
    """Return the error that `error_fields` told of: of the same class, with the same message and fields."""
    kind = getattr(errors, told["class"], None)
    if not (isinstance(kind, type) and issubclass(kind, LuthierError)):
        return EngineError(f"{told['class']}: {told['message']}")
    # Some classes make their message of other things; here it is made already, so it is not made again.
    error = kind.__new__(kind, told["message"])
    for key, value in told["fields"].items():
        setattr(error, key, tuple(value) if isinstance(value, list) else value)
    return error
