"""A request on its way through the engine: what its caller holds, and what the engine carries along. Loads no torch."""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np

from luthier.engine.requests import Completion, FinishReason, Mix, Sampling, TokenLogprob
from luthier.engine.text import TextStream
from luthier.models.pooling import PoolingKind

if TYPE_CHECKING:
    from luthier.engine.adapters import AdapterWeights
    from luthier.engine.drawing import RowDraw

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What came since the last event: text (perhaps none yet), tokens, and with the last one the whole answer."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    completion: Completion | None = None


class Handle:
    """A request that was taken: iterate over its events, wait for its `result`, or `cancel` it.

    With `on_event` events go there, in the engine's thread, and are not kept for iteration; if it raises, the request ends.
    """

    def __init__(self, id: str, cancel: Callable[[str], None], on_event: Callable[[Event], None] | None = None):
        self.id = id
        self._cancel, self._on_event = cancel, on_event
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._result: Future[Completion] = Future()

    def __iter__(self) -> Iterator[Event]:
        """Yield events as they come; the last one holds the completion. Leaving early cancels the request.

        Raises: what the request failed with.
        """
        done = False
        try:
            while not done:
                event = self._events.get()
                done = event.completion is not None
                if done:
                    self.result()
                yield event
        finally:
            if not done:
                self.cancel()

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the whole answer. Raises: what the request failed with, TimeoutError."""
        return self._result.result(timeout)

    def cancel(self) -> None:
        """Stop it, wherever it is; what was made until then is its result."""
        self._cancel(self.id)

    def give(self, event: Event, error: Exception | None = None) -> None:
        """Pass an event on; with the last one, the result or the error."""
        if event.completion is not None:
            if error is not None:
                self._result.set_exception(error)
            else:
                self._result.set_result(event.completion)
        if self._on_event is None:
            self._events.put(event)
            return
        try:
            self._on_event(event)
        except Exception:  # the engine's thread has others to serve
            log.exception("on_event of request %s failed; the request is cancelled", self.id)
            self.cancel()


@dataclass(eq=False)
class Job:
    """What the engine knows of a request. `names` are its adapters with their strengths, `mix` the same by content.

    With `targets` nothing is generated: for each prompt token they name the next one whose log-probability is asked for, or -1.
    With `pooling` neither: the last hidden states of the prompt become one vector.
    """

    handle: Handle
    prompt: tuple[int, ...]
    names: dict[str, float]
    tenant: str
    sampling: Sampling
    row: "RowDraw"
    text: TextStream | None
    targets: tuple[int, ...] | None = None
    pooling: PoolingKind | None = None
    pooled_I: "np.ndarray | None" = None
    mix: Mix = ()
    futures: "dict[str, Future[AdapterWeights]]" = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    cached: int = 0
    reached: int = 0
    is_open: bool = False
    stop_token: int | None = None
    taken_at: float = field(default_factory=time.monotonic)
    opened_at: float | None = None
    first_at: float | None = None

    @property
    def id(self) -> str:
        """The engine's name for it."""
        return self.handle.id

    @property
    def max_new_tokens(self) -> int:
        """How many tokens it may come to hold beside its prompt."""
        return self.sampling.max_new_tokens if self.targets is None and self.pooling is None else 0

    @property
    def shared(self) -> tuple[int, ...]:
        """The tokens of the prompt whose beginning may come from the prefix cache: none that is itself asked about."""
        if self.pooling in ("mean", "first"):
            return self.prompt[:1]
        if self.targets is None:
            return self.prompt
        first = next(place for place, target in enumerate(self.targets) if target >= 0)
        return self.prompt[: first + 1]

    def pool(self, hidden_TI: "np.ndarray") -> None:
        """Take in the last hidden states of the next tokens of the prompt."""
        if self.pooling == "mean":
            summed_I = hidden_TI.sum(axis=0, dtype=np.float64) / len(self.prompt)
            self.pooled_I = summed_I if self.pooled_I is None else self.pooled_I + summed_I
        elif self.pooling == "last":
            self.pooled_I = hidden_TI[-1]
        elif self.pooled_I is None:
            self.pooled_I = hidden_TI[0]

    def completion(self, reason: FinishReason, error: Exception | None = None) -> Completion:
        """Return the answer as it is now."""
        now = time.monotonic()
        return Completion(
            text="".join(self.said),
            token_ids=tuple(self.tokens),
            finish_reason=reason,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            logprobs=tuple(self.logprobs) if self.sampling.logprobs is not None or self.targets is not None else None,
            queue_seconds=None if self.opened_at is None else self.opened_at - self.taken_at,
            first_token_seconds=None if self.first_at is None else self.first_at - self.taken_at,
            seconds=now - self.taken_at,
            error=None if error is None else str(error),
            vector=None if self.pooled_I is None else tuple(self.pooled_I.tolist()),
            stop_token=self.stop_token,
        )
