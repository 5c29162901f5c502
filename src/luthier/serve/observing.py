"""What is noted of a request while it is answered, in one place: metrics, the log and traces read it when it is over.

`Observing` is the ASGI layer around the app. It puts an `Observed` where everything that works on the request finds it
(`observed()`), and gives it to its readers with the request's end, whatever that was. Notes are counts, names and times; prompts
and answers are kept only where the log was told to have them.
"""

import time
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from luthier.engine.jobs import Event
from luthier.registry.view import Caller

GONE = 499
"""The status of a request whose client left before the answer was complete (nginx's number; it is never sent)."""

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class AnswerNotes:
    """One answer of a request (there are several with `n`). Seconds count from `began`, by time.monotonic."""

    adapter: str | None
    prompt_tokens: int
    prompt_ids: tuple[int, ...] = ()
    texts: list[str] = field(default_factory=list)
    keeps_text: bool = False
    began: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    new_tokens: int = 0
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    last_token_seconds: float | None = None
    finish_reason: str | None = None

    def saw(self, event: Event) -> None:
        """Note an event that is passed on."""
        if event.token_ids:
            self.last_token_seconds = time.monotonic() - self.began
            if self.first_token_seconds is None:
                self.first_token_seconds = self.last_token_seconds
            self.new_tokens += len(event.token_ids)
        if self.keeps_text:
            self.texts.append(event.text)
        if event.completion is not None:
            self.cached_tokens = event.completion.cached_tokens
            self.queue_seconds = event.completion.queue_seconds
            self.finish_reason = event.completion.finish_reason

    @property
    def token_seconds(self) -> float | None:
        """Seconds for each token after the first; None where there are not two."""
        if self.new_tokens < 2 or self.last_token_seconds is None or self.first_token_seconds is None:
            return None
        return (self.last_token_seconds - self.first_token_seconds) / (self.new_tokens - 1)


@dataclass
class Observed:
    """One HTTP request. `route` is the path as it was declared, so that there are few of them; `at` is wall time."""

    id: str = ""
    method: str = ""
    route: str = "other"
    traceparent: str | None = None
    at: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    caller: Caller | None = None
    model: str | None = None
    answers: list[AnswerNotes] = field(default_factory=list)
    error: str | None = None
    status: int = 500
    seconds: float = 0.0

    def answer(self, model: str, adapter: str | None, prompt_ids: tuple[int, ...], *, keeps_text: bool = False) -> AnswerNotes:
        """Note that an answer begins. `model` is a name that the caller may use: what else stood in the request is no name."""
        self.model = model
        answered = AnswerNotes(adapter, len(prompt_ids), prompt_ids if keeps_text else (), keeps_text=keeps_text)
        self.answers.append(answered)
        return answered


Reader = Callable[[Observed], None]
_current: ContextVar[Observed | None] = ContextVar("observed", default=None)


def observed() -> Observed:
    """Return the notes of the request that is being worked on; outside of one, notes that nobody reads."""
    return _current.get() or Observed()


class Observing:
    """ASGI middleware: notes each HTTP request, under the id that the app has given it."""

    def __init__(self, app: Any, readers: Iterable[Reader]):
        self.app, self.readers = app, tuple(readers)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, and tell the readers of it when it is over."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        notes = Observed(method=scope["method"], traceparent=headers.get(b"traceparent", b"").decode("latin-1") or None)
        is_gone = is_complete = False

        async def heard() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or (message["type"] == "http.disconnect" and not is_complete)
            return message

        async def said(message: Message) -> None:
            nonlocal is_complete
            if message["type"] == "http.response.start":
                notes.status = message["status"]
            elif message["type"] == "http.response.body":
                is_complete = not message.get("more_body", False)
            await send(message)

        token = _current.set(notes)
        try:
            await self.app(scope, heard, said)
        finally:
            _current.reset(token)
            notes.id = scope.get("state", {}).get("request_id", "")
            notes.seconds = time.monotonic() - notes.began
            notes.route = getattr(scope.get("route"), "path", "other")
            notes.status = GONE if is_gone else notes.status
            for read in self.readers:
                read(notes)
