"""Gateway: from a caller and a name to an answer, whoever's API asked.

key -> Caller             who asks, and what it may do                            (401, 403)
name -> Target -> Route   of this caller's names only; an arm, where an experiment shares a surface out     (404, 503)
Route -> events           let in by the limits, through the backend, written down at the end                (429, 503)
"""

import logging
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from luthier.core.errors import (
    AdapterError,
    AdapterStateError,
    BaseMismatchError,
    BlobError,
    ConfigError,
    DataError,
    EngineError,
    LuthierError,
    MissingExtraError,
    QueueFullError,
    RefusedError,
    RequestError,
    UnservableError,
)
from luthier.engine.jobs import Event
from luthier.engine.requests import Sampling
from luthier.registry.split import unit_digest
from luthier.registry.tenancy import Scope, digest_of_key
from luthier.registry.view import BaseTarget, Caller, ServingView, SurfaceTarget, Target, VersionTarget
from luthier.serve.access import RegistryAccess
from luthier.serve.backend import Ask, Backend
from luthier.serve.background import is_away
from luthier.serve.errors import ApiError, no_key, no_model, not_allowed, server_fault, too_many, unavailable
from luthier.serve.guarding import Guard
from luthier.serve.ledger import Answered, Ledger
from luthier.serve.limits import Limits, Permit
from luthier.serve.observing import observed
from luthier.serve.prompts import Prompts
from luthier.serve.residency import Residency, Use
from luthier.serve.settings import ServeSettings
from luthier.serve.views import Views

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Route:
    """What answers a request: the adapter's reference for the backend (None: the base), and what a record of it needs.

    `unit` is the digest of the unit that sees an arm of an experiment; it, `experiment_id` and `epoch` are None where nothing is
    to be counted.
    """

    model: str
    adapter: str | None
    version: VersionTarget | None = None
    surface_id: int | None = None
    experiment_id: int | None = None
    epoch: int | None = None
    unit: bytes | None = None


class Gateway:
    """Everything that requests share. `tokenizer` is the base's; it renders chats and counts tokens in this process."""

    def __init__(
        self,
        settings: ServeSettings,
        backend: Backend,
        tokenizer: Any,
        views: Views,
        *,
        limits: Limits | None = None,
        residency: Residency | None = None,
        ledger: Ledger | None = None,
        guard: Guard | None = None,
        registry: RegistryAccess | None = None,
    ):
        self.settings, self.backend, self.tokenizer, self.views = settings, backend, tokenizer, views
        self.prompts = Prompts(tokenizer)
        self.limits = limits or Limits(settings.max_waiting)
        self.residency = residency or Residency(backend)
        self.ledger, self.guard, self.registry = ledger, guard, registry
        self.is_draining = False

    # --- life ------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the backend, and then what goes on beside the requests."""
        await self.backend.start()
        self.residency.start()
        await self.views.start(self.residency.take)
        if self.ledger is not None:
            await self.ledger.start()
        if self.guard is not None:
            self.guard.start()

    async def close(self) -> None:
        """Take no requests, end what runs as cancelled, and write down what is known of it."""
        self.is_draining = True
        await self.backend.close()
        if self.guard is not None:
            await self.guard.close()
        await self.views.close()
        await self.residency.close()
        if self.ledger is not None:
            await self.ledger.close()
        if self.registry is not None:
            self.registry.close()
        self.prompts.close()

    def drain(self) -> None:
        """Take no new requests; those under way go on. There is no way back but a restart."""
        self.is_draining = True

    async def unready_because(self) -> list[str]:
        """Return why no request should be sent here now, in words that tell nothing of tenants; empty where one may be."""
        found = [
            "the server is being drained" if self.is_draining else None,
            self.views.fault(),
            self.ledger.fault() if self.ledger is not None else None,
            "adapters are being read" if self.residency.is_starting else None,
        ]
        if await self.backend.state() is not None:  # its words may name files and adapters: they are for the log
            found.append("the engine does not answer")
        return [reason for reason in found if reason is not None]

    # --- who and what ----------------------------------------------------------------------------------------

    def view(self) -> ServingView:
        """Return what counts now. Raises: ApiError 503 while the registry has been away for too long."""
        self.views.current()
        return self.residency.view

    def caller(self, authorization: str | None, scope: Scope = Scope.INFERENCE) -> Caller:
        """Return who sent this Authorization header. Raises: ApiError 401, or 403 where its key has not the scope."""
        kind, _, key = (authorization or "").partition(" ")
        caller = self.view().callers.get(digest_of_key(key.strip()))
        if kind.lower() != "bearer" or caller is None or (caller.expires_at and caller.expires_at <= datetime.now(UTC)):
            raise no_key()
        if scope not in caller.scopes:
            raise not_allowed(scope)
        observed().caller = caller
        return caller

    def target(self, caller: Caller, name: str) -> Target:
        """Return what a name means to a caller. Raises: ApiError 404."""
        found = self.view().names.get(caller.tenant_id, {}).get(name)
        if found is None:
            raise no_model(name)
        return found

    def unit_of(self, caller: Caller, name: str, *, user: str | None = None, session: str | None = None) -> str | None:
        """Return the unit that an experiment behind a name counts, of what a request says of itself; None where there is none.

        Users and sessions are those of one tenant: another tenant's alice is somebody else.
        """
        target = self.target(caller, name)
        if not isinstance(target, SurfaceTarget) or target.arms is None:
            return None
        if target.arms.unit == "tenant":
            return caller.tenant
        told = {"user": user, "session": session}.get(target.arms.unit)
        return f"{caller.tenant}/{told}" if told else None

    def route(self, caller: Caller, name: str, *, unit: str | None = None) -> Route:
        """Return which version answers. `unit` decides the arm of an experiment; without one it is the control.

        Raises: ApiError 404 for a name, 503 for a surface that nothing serves.
        """
        target = self.target(caller, name)
        if isinstance(target, BaseTarget):
            return Route(name, None)
        if isinstance(target, VersionTarget):
            return Route(name, target.reference, target)
        return self._route_surface(target, name, unit)

    def _route_surface(self, target: SurfaceTarget, name: str, unit: str | None) -> Route:
        chosen, arms = target.control, target.arms
        counted: tuple[int | None, int | None, bytes | None] = (None, None, None)
        if arms is not None and unit is not None:
            arm = arms.versions.get(arms.split.arm(unit))
            if arm is not None:  # who sees the control in place of an arm that may not be used is not counted for it
                chosen, counted = arm, (arms.experiment_id, arms.epoch, unit_digest(arms.salt, unit))
        if chosen is None:
            raise unavailable(f"Nothing serves {name} now.")
        return Route(name, chosen.reference, chosen, target.surface_id, *counted)

    # --- answers ---------------------------------------------------------------------------------------------

    async def stream(
        self,
        caller: Caller,
        route: Route,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        *,
        request_id: str | None = None,
        is_further: bool = False,
    ) -> AsyncGenerator[Event, None]:
        """Yield the answer's events; the last one holds the completion. Raises: ApiError.

        Whatever its end, it is written down once under `request_id`, before the last event is given out. `is_further` says that
        it is one more answer to a prompt, which is paid for once.
        """
        request_id = request_id or f"req-{secrets.token_hex(12)}"
        async with self._answering(caller, route, len(prompt_ids), sampling.max_new_tokens, request_id) as answer:
            answer.is_further = is_further
            ask = Ask(request_id, prompt_ids, route.adapter, sampling, caller.tenant)
            notes = observed().answer(route.model, route.adapter, prompt_ids, keeps_text=self.settings.log_prompts)
            async with aclosing(self.backend.stream(ask)) as events:
                async for event in events:
                    answer.check()
                    answer.see(event)
                    notes.saw(event)
                    yield event

    async def embed(
        self, caller: Caller, route: Route, rows: list[tuple[int, ...]], *, request_id: str | None = None
    ) -> list[list[float]]:
        """Return a vector for each row of token ids. Raises: ApiError."""
        request_id = request_id or f"emb-{secrets.token_hex(12)}"
        async with self._answering(caller, route, sum(map(len, rows)), 0, request_id) as answer:
            vectors = await self.backend.embed(rows, route.adapter)
            answer.check()
            answer.end("stop", is_seen=True)
            return vectors

    @asynccontextmanager
    async def _answering(
        self, caller: Caller, route: Route, prompt_tokens: int, most_tokens: int, request_id: str
    ) -> "AsyncGenerator[_Answer, None]":
        """Let a request in, keep its adapter, and write its end down. Raises: ApiError, also for errors of the block."""
        if self.is_draining:
            raise unavailable("The server is being stopped and takes no new requests.")
        if self.ledger is not None and (fault := self.ledger.fault()):
            raise unavailable(f"No request is taken now: {fault}.", 5)
        permit = self.limits.enter(caller, prompt_tokens + most_tokens)
        answer = _Answer(self, caller, route, permit, request_id, prompt_tokens)
        try:
            if route.version is not None:
                answer.use = await self.residency.enter(route.version)
            yield answer
        except LuthierError as error:
            refusal = refusal_of(error)
            if refusal.status not in (400, 429):
                log.warning("request %s to %s failed: %s", request_id, route.model, error)
            answer.end("held" if answer.is_stopped else "error", is_refused=refusal.status in (400, 429))
            raise refusal from error
        except Exception as error:
            answer.end("error")
            if is_away(error):
                raise unavailable("Something that this request needs is out of reach. Try again later.") from error
            raise
        finally:
            answer.end("cancelled")
            if answer.use is not None:
                self.residency.leave(answer.use)


class _Answer:
    """What is known of an answer under way, written down when it ends."""

    def __init__(self, gateway: Gateway, caller: Caller, route: Route, permit: Permit, request_id: str, prompt_tokens: int):
        self.request_id = request_id
        self._gateway, self._caller, self._route, self._permit = gateway, caller, route, permit
        self._prompt_tokens, self._cached, self._made = prompt_tokens, 0, 0
        self._is_seen, self._is_open = False, True
        self.use: Use | None = None
        self.is_further = False

    @property
    def is_stopped(self) -> bool:
        """Whether its version may not be used any more."""
        return self.use is not None and self.use.ended_because is not None

    def check(self) -> None:
        """Raise RefusedError where its version may not be used any more."""
        if self.use is not None and self.use.ended_because is not None:
            raise RefusedError(self.use.ended_because)

    def see(self, event: Event) -> None:
        """Count an event; the last one ends the answer."""
        self._is_seen = True
        self._made += len(event.token_ids)
        if event.completion is not None:
            self._made, self._cached = len(event.completion.token_ids), event.completion.cached_tokens
            self.end(event.completion.finish_reason)

    def end(self, status: str, *, is_refused: bool = False, is_seen: bool = False) -> None:
        """Settle with the limits and write it down; only the first end counts, and a refusal is no answer.

        Who goes away before the first token pays for the prompt, since that may have been read; for a failure nobody pays more
        than was seen.
        """
        if not self._is_open:
            return
        self._is_open = False
        self._is_seen |= is_seen
        prompt = self._prompt_tokens if (self._is_seen or status == "cancelled") and not self.is_further else 0
        self._permit.settle(prompt + self._made)
        if is_refused or self._gateway.ledger is None:
            return
        route, counts = self._route, self._is_seen
        self._gateway.ledger.record(
            Answered(
                request_id=self.request_id,
                tenant_id=self._caller.tenant_id,
                key_id=self._caller.key_id,
                version_id=route.version.version_id if route.version else None,
                model=route.model,
                surface_id=route.surface_id,
                experiment_id=route.experiment_id if counts else None,
                epoch=route.epoch if counts else None,
                unit_digest=route.unit.hex() if route.unit and counts else None,
                prompt_tokens=prompt,
                cached_tokens=min(self._cached, prompt),
                completion_tokens=self._made,
                status=status,
                finished_at=datetime.now(UTC),
            )
        )


def refusal_of(error: LuthierError) -> ApiError:
    """Return the answer to a request that failed with an error of luthier's.

    What is the server's own fault says little: messages about files and adapters name folders, and are for the log.
    """
    if isinstance(error, QueueFullError):
        return too_many(str(error), code="queue_full")
    if isinstance(error, ConfigError | DataError | RequestError | MissingExtraError):
        return ApiError(400, str(error))
    if isinstance(error, AdapterError | BlobError | RefusedError | AdapterStateError):
        return ApiError(409, _unusable(error), code="adapter_unusable")
    if isinstance(error, EngineError):
        return unavailable("The engine does not answer now. Try again later.")
    return server_fault()


def _unusable(error: LuthierError) -> str:
    if isinstance(error, BaseMismatchError):
        return "The adapter cannot be used here: it was trained on another base model. The server's log says more."
    if isinstance(error, UnservableError):
        return f"The adapter cannot be used here: {error}."
    if isinstance(error, AdapterStateError):
        return "The adapter cannot be used at this moment. Try again later."
    if isinstance(error, RefusedError):
        return "The adapter may not be used any more."
    return "The adapter cannot be used: its files are missing, damaged or do not fit the base model. The server's log says more."
