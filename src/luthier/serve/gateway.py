"""Gateway: from a caller and a name to an answer, whoever's API asked.

key -> Caller             who asks, and what it may do                            (401, 403)
name -> Target -> Route   of this caller's names only; an arm, where an experiment shares a surface out     (404, 503)
Route -> events           through the backend, counted and bounded                (429)
"""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
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
)
from luthier.engine.jobs import Event
from luthier.engine.requests import Sampling
from luthier.registry.tenancy import Scope, digest_of_key
from luthier.registry.view import BaseTarget, Caller, SurfaceTarget, Target, VersionTarget
from luthier.serve.backend import Ask, Backend
from luthier.serve.errors import ApiError, no_key, no_model, not_allowed, too_many, unavailable
from luthier.serve.observing import observed
from luthier.serve.prompts import Prompts
from luthier.serve.settings import ServeSettings
from luthier.serve.views import Views


@dataclass(frozen=True)
class Route:
    """What answers a request: the adapter's reference for the backend (None: the base), and what a record of it needs."""

    model: str
    adapter: str | None
    version: VersionTarget | None = None
    surface: str | None = None
    experiment_id: int | None = None
    epoch: int | None = None


class Gateway:
    """Everything that requests share. `tokenizer` is the base's; it renders chats and counts tokens in this process."""

    def __init__(self, settings: ServeSettings, backend: Backend, tokenizer: Any, views: Views):
        self.settings, self.backend, self.tokenizer, self.views = settings, backend, tokenizer, views
        self.prompts = Prompts(tokenizer)

    def caller(self, authorization: str | None, scope: Scope = Scope.INFERENCE) -> Caller:
        """Return who sent this Authorization header. Raises: ApiError 401, or 403 where its key has not the scope."""
        kind, _, key = (authorization or "").partition(" ")
        caller = self.views.current().callers.get(digest_of_key(key.strip()))
        if kind.lower() != "bearer" or caller is None or (caller.expires_at and caller.expires_at <= datetime.now(UTC)):
            raise no_key()
        if scope not in caller.scopes:
            raise not_allowed(scope)
        observed().caller = caller
        return caller

    def target(self, caller: Caller, name: str) -> Target:
        """Return what a name means to a caller. Raises: ApiError 404."""
        found = self.views.current().names.get(caller.tenant_id, {}).get(name)
        if found is None:
            raise no_model(name)
        return found

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
        if arms is not None and unit is not None:
            chosen = arms.versions.get(arms.split.arm(unit), chosen)
        if chosen is None:
            raise unavailable(f"Nothing serves {name} now.")
        experiment = (arms.experiment_id, arms.epoch) if arms is not None and unit is not None else (None, None)
        return Route(name, chosen.reference, chosen, target.surface, *experiment)

    async def stream(
        self, caller: Caller, route: Route, prompt_ids: tuple[int, ...], sampling: Sampling
    ) -> AsyncGenerator[Event, None]:
        """Yield the answer's events; the last one holds the completion. Raises: ApiError."""
        ask = Ask(f"req-{secrets.token_hex(12)}", prompt_ids, route.adapter, sampling, caller.tenant)
        notes = observed().answer(route.model, route.adapter, prompt_ids, keeps_text=self.settings.log_prompts)
        try:
            async with aclosing(self.backend.stream(ask)) as events:
                async for event in events:
                    notes.saw(event)
                    yield event
        except LuthierError as error:
            raise refusal_of(error) from error

    async def embed(self, caller: Caller, route: Route, rows: list[tuple[int, ...]]) -> list[list[float]]:
        """Return a vector for each row of token ids. Raises: ApiError."""
        try:
            return await self.backend.embed(rows, route.adapter)
        except LuthierError as error:
            raise refusal_of(error) from error


def refusal_of(error: LuthierError) -> ApiError:
    """Return the answer to a request that failed with an error of luthier's. What is the server's own fault says little."""
    if isinstance(error, QueueFullError):
        return too_many(str(error), code="queue_full")
    if isinstance(error, ConfigError | DataError | RequestError | MissingExtraError):
        return ApiError(400, str(error))
    if isinstance(error, BaseMismatchError | AdapterError | BlobError | RefusedError | AdapterStateError):
        return ApiError(409, str(error), code="adapter_unusable")
    if isinstance(error, EngineError):
        return unavailable(f"The engine does not answer: {error}")
    return ApiError(500, "The server failed; its log says why.", type="server_error")
