"""Where a gateway's view of the registry comes from: fixed when it starts, or read anew whenever the registry changes."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Protocol

from luthier.registry.tenancy import Scope, digest_of_key
from luthier.registry.view import BaseTarget, Caller, ServingView, Target, VersionTarget

LOCAL = "local"


class Views(Protocol):
    """Gives the view that counts now."""

    def current(self) -> ServingView:
        """Return the newest view. Raises: ApiError 503 when it is too old to be trusted."""
        ...


class FixedViews:
    """One view for good: a gateway without a registry."""

    def __init__(self, view: ServingView):
        self._view = view

    def current(self) -> ServingView:
        """Return the view."""
        return self._view


def local_view(key: str, base: str, adapters: Iterable[str]) -> ServingView:
    """Return the view of a gateway without a registry: one tenant, one key that may do everything, folders by name."""
    caller = Caller(0, LOCAL, 0, LOCAL, frozenset({Scope.INFERENCE, Scope.ADMIN}))
    moment = datetime.now(UTC)
    names: dict[str, Target] = {base: BaseTarget(base, moment)}
    names |= {name: VersionTarget(name, created_at=moment) for name in adapters}
    return ServingView(0, {digest_of_key(key): caller}, {0: names}, {0: tuple(names)})
