"""Engine: many requests for different adapters over one base, in one batch that they join and leave at any step.

The face of the room: settings and requests are checked here, in the caller's thread; `luthier.engine.loop` runs them. Never
renders a prompt (token ids come in), knows no HTTP and no tenants' rights.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from luthier.core.errors import ConfigError, DataError, EngineError, ModelError, QueueFullError
from luthier.core.threads import release_thread_pool
from luthier.engine.adapters import AdapterReport
from luthier.engine.constraints import Constraints
from luthier.engine.drawing import RowDraw
from luthier.engine.hosting import Host, mix_of
from luthier.engine.jobs import Event, Handle, Job
from luthier.engine.loop import EngineLoop
from luthier.engine.requests import Completion, Sampling
from luthier.engine.runner import Runner
from luthier.engine.scheduler import Limits
from luthier.engine.text import TextStream
from luthier.ops.prepacked import known_form

if TYPE_CHECKING:
    from luthier.formats.fingerprint import Fingerprint
    from luthier.models.pooling import Pooling

GREEDY = Sampling()
ONE_TOKEN = Sampling(max_new_tokens=1)

PREFIX_BYTES = 256 * 2**20
"""Memory for the beginnings of prompts seen before, unless it is said otherwise."""

KV_BYTES = 2**30
"""Memory for keys and values of running requests, unless `limits` says so in tokens."""

Adapter = str | Mapping[str, float] | None
"""Which adapters answer: one by name, several with strengths, or None for the base."""


class Engine:
    """Answers requests over one base model until `close`; also a context manager.

    `limits.kv_tokens` bounds the tokens of all running requests; limits in a dictionary may leave it to KV_BYTES. `prefix_bytes`
    bounds what is kept of prompts seen before (0: nothing), `adapter_bytes` the adapters in memory. A model of an architecture
    the engine does not know is served by its own forward.
    `form` is that of the base's weights: "float", "int8", "int4" or "nf4" (docs/engine.md). `reload` gives the base anew where
    an adapter has to be merged; without it those are refused. `pooling` is how hidden states become an embedding.
    Raises: ConfigError for a form that is not known, or that this model cannot have.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        adapters: Mapping[str, Any] | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        form: str = "float",
        prefix_bytes: int = PREFIX_BYTES,
        adapter_bytes: int = 2**30,
        registry: Any = None,
        reload: Callable[[], Any] | None = None,
        pooling: "Pooling | None" = None,
    ):
        self.tokenizer, self._pooling = tokenizer, pooling
        self.no_embeddings_because: str | None = None if pooling else "nothing says how its hidden states are pooled"
        self._host = Host(
            model,
            adapter_bytes=adapter_bytes,
            prefix_bytes=prefix_bytes,
            form=known_form(form),
            registry=registry,
            reload=reload,
        )
        self.limits = self._with_room(limits)
        eos = tokenizer.eos_token_id
        self._stop_ids = self._host.eos_ids | (frozenset() if eos is None else {int(eos)})
        self._numbers = itertools.count()
        for name, source in (adapters or {}).items():
            self._host.add(name, source)
        release_thread_pool()
        self._loop = EngineLoop(self._host, self.limits)

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer, self._host.vocabulary, self._stop_ids)

    def _with_room(self, limits: Limits | Mapping[str, Any] | None) -> Limits:
        runner, longest = self._host.runner, self._host.longest
        if not isinstance(limits, Limits):
            tokens = KV_BYTES // runner.kv.bytes_per_token() if isinstance(runner, Runner) else 8 * (longest or 4096)
            limits = Limits(**{"kv_tokens": tokens} | dict(limits or {}))
        known = limits.max_request_tokens
        return limits if longest is None else limits.changed(max_request_tokens=min(longest, known or longest))

    @classmethod
    def load(
        cls,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str = "none",
        form: str = "float",
        adapters: Mapping[str, Any] | None = None,
        limits: Limits | Mapping[str, Any] | None = None,
        prefix_cache: bool = True,
        adapter_bytes: int = 2**30,
        registry: Any = None,
        progress: Callable[[str], None] | None = None,
    ) -> Self:
        """Load a base by what `load_model` takes, and serve it. Its own weights are let go once they are laid out.

        `quantize` says which base it is (what adapters were trained on), `form` how its weights are held: with quantize "nf4",
        form "nf4" keeps those very codes and "float" widens them once. Raises: what `load_model` and the engine raise.
        """
        from luthier.models import load_model
        from luthier.models.pooling import read_pooling

        form = known_form(form)
        loaded = load_model(model, dtype=dtype, device=device, quantize=quantize, progress=progress)
        tokenizer = loaded.tokenizer
        kept = str(loaded.dtype_choice.dtype).removeprefix("torch.")

        def reload() -> Any:
            return load_model(model, dtype=kept, device=device, quantize=quantize).model

        try:
            pooling, fault = read_pooling(loaded.path), None
        except ModelError as error:
            pooling, fault = None, str(error)
        engine = cls(
            loaded.model,
            tokenizer,
            adapters=adapters,
            limits=limits,
            form=form,
            prefix_bytes=PREFIX_BYTES if prefix_cache else 0,
            adapter_bytes=adapter_bytes,
            registry=registry,
            reload=reload,
            pooling=pooling,
        )
        engine.no_embeddings_because = fault
        return engine

    @property
    def slow_because(self) -> str | None:
        """Why the model is served by its own forward, each request by itself; None where the engine has one for it."""
        return self._host.slow_because

    @property
    def fingerprint(self) -> "Fingerprint":
        """Who the base is; adapters of another one are refused."""
        return self._host.store.base.fingerprint

    @property
    def closed_because(self) -> str | None:
        """Why it takes no requests; None while it does."""
        return self._loop.closed_because

    # --- adapters --------------------------------------------------------------------------------------------

    def knows(self, name: str) -> bool:
        """Return whether a name was added and not unloaded since."""
        return self._host.store.knows(name)

    def add_adapter(self, name: str, source: Any, *, force: bool = False) -> None:
        """Make an adapter known: a folder, that of a run, or with a registry NAME:VERSION or NAME:ALIAS. Reads nothing yet.

        A name that is known means the new one from now on; the old one goes once those who have it are done. With `force` it is
        taken although it was trained on another base.
        """
        self._loop.when_drained(self._host.add(name, source, force=force))

    def check_adapter(self, name: str) -> AdapterReport:
        """Read an adapter now, not with its first request, and say what is to be known of it here.

        Raises: AdapterFormatError, AdapterMismatchError, BaseMismatchError, AdapterStateError.
        """
        weights = self._host.store.acquire(name).result()
        self._host.store.release(weights.key)
        return AdapterReport(weights.base, weights.needs_merge)

    def unload_adapter(self, name: str) -> "Future[None]":
        """Forget a name: no new request gets it, those that have it finish.

        Done when its memory has been given back: of its weights, its place in the batch, and prompts that were read with it.
        Raises: AdapterStateError for a name that is not known.
        """
        return self._loop.when_drained(self._host.store.unload(name))

    # --- requests --------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: Adapter = None,
        sampling: Sampling = GREEDY,
        tenant: str = "",
        on_event: Callable[[Event], None] | None = None,
    ) -> Handle:
        """Take a request and return at once. `adapter`: a name, names with strengths, or None for the base.

        `on_event` is called in the engine's thread instead of keeping events for iteration; it must be short.
        Raises: ConfigError or DataError for what can never run, AdapterStateError for an unknown adapter, QueueFullError.
        """
        row = RowDraw(
            sampling,
            prompt_ids,
            stop_ids=self._stop_ids,
            matcher=None if sampling.constraint is None else self._constraints.matcher(sampling.constraint),
        )
        text = TextStream(self.tokenizer, sampling.stop, row.stop_ids)
        return self._take(Job(self._handle(on_event), tuple(prompt_ids), mix_of(adapter), tenant, sampling, row, text))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        adapters: Sequence[Adapter] | Adapter = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        tenant: str = "",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answer all prompts, in their order. One adapter and one sampling for all, or one for each."""
        each_adapter = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str | Mapping) else list(adapters)
        each_sampling = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if not len(prompts) == len(each_adapter) == len(each_sampling):
            raise ConfigError(
                f"{len(prompts)} prompts, {len(each_adapter)} adapters and {len(each_sampling)} samplings do not fit each other"
            )
        asked = zip(prompts, each_adapter, each_sampling, strict=True)
        calls = (partial(self.submit, ids, adapter=name, sampling=how, tenant=tenant) for ids, name, how in asked)
        return self._results(calls, len(prompts), on_progress)

    def generate_together(
        self, prompts: Sequence[Sequence[int]], adapter: str, samplings: Sequence[Sampling]
    ) -> list[Completion]:
        """Answer all prompts with one adapter, all of them there before the first step.

        Where nothing else is asked meanwhile, which rows meet in which step then follows from the request alone, and so does
        every bit of the answers. Raises: as `submit` does; QueueFullError for more than the queue takes.
        """
        self.check_adapter(adapter)  # reads it now, so that nobody waits for a file
        with self._loop.held():
            handles: list[Handle] = []
            try:
                for ids, sampling in zip(prompts, samplings, strict=True):
                    handles.append(self.submit(ids, adapter=adapter, sampling=sampling))
            except BaseException:
                for handle in handles:
                    handle.cancel()
                raise
        return [handle.result() for handle in handles]

    def stream(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: Adapter = None,
        sampling: Sampling = GREEDY,
        tenant: str = "",
    ) -> Iterator[Event]:
        """Yield the answer to one prompt as it is made; the last event holds the completion. Leaving early cancels it."""
        return iter(self.submit(prompt_ids, adapter=adapter, sampling=sampling, tenant=tenant))

    async def astream(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: Adapter = None,
        sampling: Sampling = GREEDY,
        tenant: str = "",
    ) -> AsyncGenerator[Event, None]:
        """As `stream`, for asyncio: nothing blocks the loop, and a task that is cancelled cancels the request."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def give(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody is there to be told
                loop.call_soon_threadsafe(events.put_nowait, event)

        if (constraint := sampling.constraint) is not None:  # read here, not in the loop: the first one takes a second
            await asyncio.to_thread(lambda: self._constraints.matcher(constraint))
        handle = self.submit(prompt_ids, adapter=adapter, sampling=sampling, tenant=tenant, on_event=give)
        done = False
        try:
            while not done:
                event = await events.get()
                done = event.completion is not None
                if event.completion is not None and event.completion.finish_reason == "error":
                    handle.result(0)
                yield event
        finally:
            if not done:
                handle.cancel()

    async def agenerate(
        self,
        prompt_ids: Sequence[int],
        *,
        adapter: Adapter = None,
        sampling: Sampling = GREEDY,
        tenant: str = "",
    ) -> Completion:
        """Answer one prompt, for asyncio."""
        async for event in self.astream(prompt_ids, adapter=adapter, sampling=sampling, tenant=tenant):
            if event.completion is not None:
                return event.completion
        raise AssertionError("a stream ends with its completion")

    def score(
        self,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        adapter: Adapter = None,
        tenant: str = "",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """Return the log-probability (nats) of each token of each continuation; rows are (context, continuation)."""

        def ask(context: Sequence[int], rest: Sequence[int]) -> Handle:
            if not context or not rest:
                raise DataError("a row to score needs a context and a continuation; a start token will do for a context")
            ids = (*context, *rest)
            targets = (*([-1] * (len(context) - 1)), *rest)
            job = Job(self._handle(None), ids[:-1], mix_of(adapter), tenant, ONE_TOKEN, RowDraw(ONE_TOKEN), None, targets)
            return self._take(job, beside=rest[-1])

        completions = self._results((partial(ask, *row) for row in rows), len(rows), on_progress)
        return [[each.logprob for each in completion.logprobs or ()] for completion in completions]

    def embed(self, rows: Sequence[Sequence[int]], *, adapter: Adapter = None, tenant: str = "") -> list[list[float]]:
        """Return a vector for each row of token ids, pooled from its last hidden states as the model's files say.

        Raises: ConfigError where they do not say; DataError for an empty row, RequestError for one that is too long.
        """
        pooling = self._pooling
        if pooling is None:
            raise ConfigError(f"this model has no embeddings: {self.no_embeddings_because}")

        def ask(ids: Sequence[int]) -> Handle:
            row = RowDraw(ONE_TOKEN)
            return self._take(
                Job(self._handle(None), tuple(ids), mix_of(adapter), tenant, ONE_TOKEN, row, None, pooling=pooling.kind)
            )

        completions = self._results((partial(ask, row) for row in rows), len(rows), None)
        if any(completion.vector is None for completion in completions):
            raise EngineError("the engine was closed while texts were embedded")
        vectors = np.array([completion.vector for completion in completions])
        if pooling.normalize:
            vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)
        return [[float(value) for value in vector] for vector in vectors]

    def stats(self) -> dict[str, Any]:
        """Return figures for metrics: what waits and runs, tokens so far, where adapters are, memory of the caches (bytes)."""
        runner = self._host.runner
        figures = {**self._loop.snapshot(), "adapters": self._host.store.residency(), "slow_because": self._host.slow_because}
        if isinstance(runner, Runner):
            prefix = runner.prefix
            figures |= {"kv_bytes": runner.kv.bytes, "stacks_bytes": runner.stacks.bytes}
            figures |= {"prefix_bytes": prefix.bytes if prefix is not None else 0}
        return figures

    def close(self) -> None:
        """Stop. What still runs or waits ends as cancelled."""
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # --- taking requests ---------------------------------------------------------------------------------------

    def _handle(self, on_event: Callable[[Event], None] | None) -> Handle:
        return Handle(f"r{next(self._numbers)}", self._loop.cancel, on_event)

    def _take(self, job: Job, beside: int = 0) -> Handle:
        faults = []
        strange = [token for token in (*job.prompt, beside) if not 0 <= token < self._host.vocabulary]
        if not job.prompt:
            faults.append("the prompt is empty; give at least one token (a start token will do)")
        if strange:
            faults.append(
                f"token {strange[0]} is not the model's, which knows 0 to {self._host.vocabulary - 1}: another tokenizer?"
            )
        alien = [token for token in job.sampling.logit_bias or () if token >= self._host.vocabulary]
        if alien:
            faults.append(f"logit_bias names token {alien[0]}, and the model knows 0 to {self._host.vocabulary - 1}")
        faults += [f"the strength of adapter {name!r} is {each}" for name, each in job.names.items() if not math.isfinite(each)]
        if faults:
            raise DataError("this request cannot be served:\n  " + "\n  ".join(faults))
        release_thread_pool()  # the caller may have multiplied a moment ago; from here on the engine's thread does
        self._loop.submit(job)
        return job.handle

    def _results(
        self, calls: Iterable[Callable[[], Handle]], total: int, on_progress: Callable[[int, int], None] | None
    ) -> list[Completion]:
        """Submit all and wait for all; where the queue is full, wait for the oldest first."""
        handles: list[Handle] = []
        completions: list[Completion] = []

        def wait() -> None:
            completions.append(handles[len(completions)].result())
            if on_progress is not None:
                on_progress(len(completions), total)

        try:
            for call in calls:
                while True:
                    try:
                        handles.append(call())
                        break
                    except QueueFullError:
                        if len(completions) == len(handles):
                            raise
                        wait()
            while len(completions) < len(handles):
                wait()
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return completions
