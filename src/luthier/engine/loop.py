"""The engine's thread: takes requests in, asks the scheduler who runs, lets the runner compute, and carries tokens back.

Everything that changes jobs or the runner happens in this thread; other threads leave calls in its inbox. Only the scheduler is
shared, under a lock, so that whoever submits is told at once that the queue is full. Never reads a file: adapters are read by
the store's workers and merged by one of its own.
"""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from luthier.core.errors import EngineError
from luthier.core.threads import release_thread_pool
from luthier.engine.adapters import AdapterWeights
from luthier.engine.decoder import Decoder
from luthier.engine.drawing import Drawn, draw
from luthier.engine.hosting import Host, keyed
from luthier.engine.jobs import Event, Job
from luthier.engine.requests import FinishReason, TokenLogprob
from luthier.engine.runner import Piece
from luthier.engine.scheduler import Chunk, Limits, Scheduler, Step, Ticket

log = logging.getLogger(__name__)


class EngineLoop:
    """Runs jobs until `close`. `submit`, `cancel`, `when_drained` and `close` may be called from any thread."""

    def __init__(self, host: Host, limits: Limits):
        self.host, self.limits = host, limits
        self.counts: Counter[str] = Counter()
        self._scheduler = Scheduler(limits)
        self._lock = threading.Lock()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._loading: dict[str, Job] = {}
        self._jobs: dict[str, Job] = {}
        self._weights: dict[str, AdapterWeights] = {}
        self._merged: dict[str, Future[Decoder | None]] = {}
        self._uses: Counter[str] = Counter()
        self._active: set[str] = set()
        self._retiring: list[tuple[set[str], Future[None]]] = []
        self._merging = ThreadPoolExecutor(1, thread_name_prefix="luthier-merging")
        self._is_closed = False
        self._fault: EngineError | None = None
        self._thread = threading.Thread(target=self._loop, name="luthier-engine", daemon=True)
        self._thread.start()

    # --- from any thread ---------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Take a job. Raises: RequestError, QueueFullError, AdapterStateError, EngineError once closed."""
        ticket = self._ticket(job, ())
        with self._lock:
            if self._is_closed:
                raise EngineError("this engine has been closed")
            if self._fault is not None:
                raise self._fault
            self._scheduler.check(ticket)
            loading = list(self._loading.values())
            self._scheduler.check_queue(job.tenant, len(loading), sum(each.tenant == job.tenant for each in loading))
            self._loading[job.id] = job
        try:
            for name in job.names:
                # One that holds nothing yet may wait for room: those who hold the memory run, and give it back.
                job.futures[name] = self.host.store.acquire(name, waits_for_room=len(job.names) == 1)
        except Exception:
            self._loading.pop(job.id, None)
            self._inbox.put(partial(self._let_go, job))
            raise
        self._when_done(job.futures.values(), partial(self._arrived, job))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no step begins: what is submitted there, with adapters that are in memory, begins together."""
        released = threading.Event()

        def wait() -> None:
            released.wait()

        self._inbox.put(wait)
        try:
            yield
        finally:
            released.set()

    def cancel(self, id: str) -> None:
        """End a job, wherever it is."""
        self._inbox.put(partial(self._cancel, id))

    def when_drained(self, drained: "Future[None]") -> "Future[None]":
        """Return a future that is done when what left the store has left the engine too."""
        gone: Future[None] = Future()
        drained.add_done_callback(lambda _: self._inbox.put(partial(self._retire, gone)))
        return gone

    @property
    def closed_because(self) -> str | None:
        """Why nothing is taken any more; None while it is."""
        if self._is_closed:
            return "the engine has been closed"
        return None if self._thread.is_alive() else "the engine's thread has died"

    def snapshot(self) -> dict[str, Any]:
        """Return what runs and waits."""
        with self._lock:
            return {**self.counts, "loading": len(self._loading), "scheduler": self._scheduler.snapshot()}

    def close(self) -> None:
        """Stop; what still runs or waits ends as cancelled."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._inbox.put(lambda: None)
        self._thread.join()
        self._merging.shutdown()
        self.host.close()
        while not self._inbox.empty():  # what came too late is told that this is the end
            self._inbox.get()()
        self._active.clear()
        self._tell_retired()

    def _when_done(self, futures: "Iterable[Future[Any]]", call: Callable[[], None]) -> None:
        """Leave `call` in the inbox once all are done; in their order, so that who is first there is first served."""
        ahead = [future for future in futures if not future.done()]
        if not ahead:
            self._inbox.put(call)
        left = itertools.count(len(ahead) - 1, -1)
        for future in ahead:
            future.add_done_callback(lambda _: self._inbox.put(call) if next(left) == 0 else None)

    # --- in the engine's thread --------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            self._run_until_closed()
            for job in [*self._jobs.values(), *self._loading.values()]:
                self._end(job, "cancelled")
        except Exception as error:
            log.exception("the engine's thread failed, and all requests with it")
            fault = EngineError(f"the engine stopped by a fault of its own ({error}); make a new one")
            with self._lock:
                self._fault = fault
            for job in [*self._jobs.values(), *self._loading.values()]:
                job.handle.give(Event("", (), (), job.completion("error", fault)), fault)

    def _run_until_closed(self) -> None:
        while not self._is_closed:
            while not self._inbox.empty():
                self._inbox.get()()
            with self._lock:
                step = self._scheduler.plan(time.monotonic())
            if step is not None:
                self._run(step)
            if self._retiring:
                self._tell_retired()
            if step is None:
                release_thread_pool()  # whoever multiplies while nothing is asked here has the processors to himself
                self._inbox.get()()

    def _run(self, step: Step) -> None:
        try:
            self._change(step)
            pieces = [Piece(id, (self._jobs[id].tokens[-1],)) for id in step.decode]
            pieces += [self._piece(chunk) for chunk in step.prefill if chunk.id in self._jobs]
            if not pieces:  # adapters left, and nothing runs
                return
            stepped = self.host.runner.step(pieces)
            self.counts["steps"] += 1
            jobs = [self._jobs[piece.id] for piece in pieces if piece.wants_logits]
            drawn = draw(stepped.logits, [job.row for job in jobs]) if jobs else []
        except Exception as error:
            self._fail_step(step, error)
            return
        for place, values in stepped.scores.items():
            self._scored(self._jobs[pieces[place].id], pieces[place], values)
        for place, hidden_TI in stepped.hidden.items():
            self._pooled(self._jobs[pieces[place].id], hidden_TI.cpu().numpy())
        for job, token in zip(jobs, drawn, strict=True):
            self._drawn(job, token)

    def _change(self, step: Step) -> None:
        """Let adapters and requests in and out. A request that finds no memory for itself or its adapter fails alone."""
        for key in step.deactivated:
            if key in self._active:  # otherwise its activation had failed
                self._active.remove(key)
                self.host.deactivate(key)
            self._forget(key)
        for job in [self._jobs[id] for id in step.admitted]:
            try:
                for key, _ in job.mix:
                    self._activate(key)
                room = len(job.prompt) + job.max_new_tokens
                job.reached = self.host.runner.open(job.id, job.mix, job.shared[: job.cached + 1], room)
            except Exception as error:
                log.exception("request %s cannot begin", job.id)
                self._end(job, "error", error)
                continue
            job.is_open, job.cached, job.opened_at = True, min(job.cached, job.reached), time.monotonic()
            self.counts["cached_tokens"] += job.reached

    def _activate(self, key: str) -> None:
        if key not in self._active:
            merged = self._merged.get(key)
            self.host.activate(self._weights[key], merged.result() if merged is not None else None)
            self._active.add(key)

    def _piece(self, chunk: Chunk) -> Piece:
        job = self._jobs[chunk.id]
        # What was cached when the request came may be gone: then its first chunk begins earlier.
        start, job.reached = job.reached, chunk.stop
        self.counts["prompt_tokens"] += chunk.stop - start
        targets = None if job.targets is None else job.targets[start : chunk.stop]
        is_asked = chunk.stop == len(job.prompt) and targets is None and job.pooling is None
        return Piece(chunk.id, job.prompt[start : chunk.stop], is_asked, targets, job.pooling is not None)

    def _drawn(self, job: Job, drawn: Drawn) -> None:
        """A token of an answer: told, and the end if it is."""
        if job.first_at is None:
            job.first_at = time.monotonic()
            self.host.runner.remember(job.id)
        if job.row.fault is not None:
            self._end(job, "error", EngineError(f"the answer cannot go on: {job.row.fault}"))
            return
        with self._lock:
            self._scheduler.made(job.id, 1)
        self.counts["new_tokens"] += 1
        assert job.text is not None
        if drawn.token in job.row.stop_ids:
            job.stop_token = drawn.token
            self._end(job, "stop")
            return
        job.tokens.append(drawn.token)
        logprobs: tuple[TokenLogprob, ...] = ()
        if drawn.logprob is not None:
            logprobs = (TokenLogprob(drawn.token, drawn.logprob, drawn.alternatives),)
            job.logprobs += logprobs
        piece = job.text.push(drawn.token)
        job.said.append(piece.text)
        reason: FinishReason | None = piece.finished
        if reason is None and len(job.tokens) == job.sampling.max_new_tokens:
            reason = "length"
        if reason is None:
            job.handle.give(Event(piece.text, (drawn.token,), logprobs))
        else:
            self._end(job, reason, last=(piece.text, (drawn.token,), logprobs))

    def _scored(self, job: Job, piece: Piece, values: list[float]) -> None:
        assert piece.targets is not None
        asked = [target for target in piece.targets if target >= 0]
        job.logprobs += [TokenLogprob(token, value) for token, value in zip(asked, values, strict=True)]
        if job.reached == len(job.prompt):
            self._end(job, "length")

    def _pooled(self, job: Job, hidden_TI: "np.ndarray") -> None:
        job.pool(hidden_TI)
        if job.reached == len(job.prompt):
            self._end(job, "length")

    def _fail_step(self, step: Step, error: Exception) -> None:
        ids = dict.fromkeys((*step.decode, *(chunk.id for chunk in step.prefill), *step.admitted))
        log.exception("a step failed, and its %d requests with it", len(ids))
        for id in ids:
            if id in self._jobs:
                self._end(self._jobs[id], "error", error)

    # --- the life of a job ---------------------------------------------------------------------------------------

    def _arrived(self, job: Job) -> None:
        """Its adapters are there or not to be had. Those that have to be merged are, in a thread of their own."""
        if job.id not in self._loading:
            self._let_go(job)  # it was cancelled meanwhile
            return
        try:
            weights = {name: future.result() for name, future in job.futures.items()}
            self.host.check_mix(job.names, weights)
        except Exception as error:
            self._end(job, "error", error)
            return
        job.mix = keyed(job.names, weights)
        for each in weights.values():
            self._weights[each.key] = each
            self._uses[each.key] += 1
            job.held.append(each.key)
            if each.needs_merge and each.key not in self._merged:
                self._merged[each.key] = self._merging.submit(self.host.prepare, each)
        self._when_done([self._merged[key] for key in job.held if key in self._merged], partial(self._ready, job))

    def _ready(self, job: Job) -> None:
        """Let it wait for its turn."""
        if self._loading.pop(job.id, None) is None:
            return
        try:
            for key in job.held:
                if key in self._merged:
                    self._merged[key].result()
            job.cached = self.host.runner.cached_tokens(job.mix, job.shared)
            ticket = self._ticket(job, tuple(key for key, _ in job.mix))
            with self._lock:
                self._scheduler.add(ticket)
                for key, _ in job.mix:
                    self._scheduler.mark_ready(key)
            self._jobs[job.id] = job
        except Exception as error:
            self._end(job, "error", error)

    def _ticket(self, job: Job, keys: tuple[str, ...]) -> Ticket:
        return Ticket(job.id, job.tenant, keys, len(job.prompt), job.max_new_tokens, job.cached, arrived=time.monotonic())

    def _cancel(self, id: str) -> None:
        job = self._jobs.get(id) or self._loading.get(id)
        if job is not None:
            self._end(job, "cancelled")

    def _end(
        self,
        job: Job,
        reason: FinishReason,
        error: Exception | None = None,
        last: tuple[str, tuple[int, ...], tuple[TokenLogprob, ...]] = ("", (), ()),
    ) -> None:
        """The end of a job, for whatever reason: its room, its adapters and its caller are free."""
        self._jobs.pop(job.id, None)
        self._loading.pop(job.id, None)
        with self._lock:
            self._scheduler.cancel(job.id)
        if job.is_open:
            self.host.runner.close(job.id)
        rest = "" if job.text is None else job.text.flush()
        job.said.append(rest)
        self._let_go(job)
        self.counts[f"ended_{reason}"] += 1
        text, tokens, logprobs = last
        job.handle.give(Event(text + rest, tokens, logprobs, job.completion(reason, error)), error)

    def _let_go(self, job: Job) -> None:
        """Give back the adapters that a job has, or that come for it later."""
        for key in job.held:
            self._uses[key] -= 1
            self._forget(key)
        job.held = []
        for future in job.futures.values():
            if not future.cancel():
                future.add_done_callback(self._release)
        job.futures = {}

    def _release(self, future: "Future[AdapterWeights]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.host.store.release(future.result().key)

    def _forget(self, key: str) -> None:
        """Drop the engine's own hold on an adapter that no job has. A merged copy of the base is needed while it is active."""
        if self._uses[key] > 0:
            return
        del self._uses[key]
        self._weights.pop(key, None)
        if key not in self._active:
            self._merged.pop(key, None)

    def _retire(self, gone: "Future[None]") -> None:
        """Something left the store: whatever has no name any more leaves the active set, and the memory of prompts."""
        named = {each.key for each in self.host.store.residency().adapters if each.key is not None}
        self.host.keep_only(named)
        retiring = {key for key in self._active if key not in named and self._uses[key] <= 0}
        with self._lock:
            for key in retiring:
                self._scheduler.mark_failed(key)
        self._retiring.append((retiring, gone))

    def _tell_retired(self) -> None:
        """Tell those whose adapters are out, or were asked for again by another name."""
        out = [gone for keys, gone in self._retiring if not any(key in self._active and self._uses[key] <= 0 for key in keys)]
        self._retiring = [(keys, gone) for keys, gone in self._retiring if gone not in out]
        self.host.store.give_back(out)
