"""A gateway over a registry, put together: what is served follows the registry, and the registry hears what was used."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError
from luthier.registry.view import ServingView, read_view, revision_of
from luthier.serve.access import RegistryAccess
from luthier.serve.backend import Backend
from luthier.serve.books import RegistryBooks, RegistryHoldings, server_name
from luthier.serve.gateway import Gateway
from luthier.serve.guarding import GUARD_SECONDS, Guard
from luthier.serve.ledger import Ledger
from luthier.serve.limits import Limits
from luthier.serve.residency import Residency
from luthier.serve.settings import ServeSettings
from luthier.serve.views import Look, WatchedViews

if TYPE_CHECKING:
    from luthier.formats.fingerprint import Fingerprint
    from luthier.registry.place import Registry


def watched_gateway(
    settings: ServeSettings,
    backend: Backend,
    tokenizer: Any,
    registry: "Registry",
    *,
    fingerprint: "Fingerprint | None" = None,
    guard_seconds: float = GUARD_SECONDS,
) -> Gateway:
    """Return a gateway of that registry. With the served base's `fingerprint` versions of other bases are no names.

    Raises: ConfigError without a folder for its state, or where another server has it; StorageError.
    """
    if settings.state is None:
        raise ConfigError("a gateway with a registry needs a folder for usage that the registry has not got yet (state, --state)")
    state = Path(settings.state)
    server = server_name(state)
    views = WatchedViews(
        registry_look(registry, settings.served_name, fingerprint),
        refresh_seconds=settings.refresh_seconds,
        stale_seconds=settings.stale_seconds,
    )
    limits = Limits(settings.max_waiting)
    ledger = Ledger(state / "usage", RegistryBooks(registry.database, server), synced=limits.sync_day)
    return Gateway(
        settings,
        backend,
        tokenizer,
        views,
        limits=limits,
        residency=Residency(backend, RegistryHoldings(registry.database, server)),
        ledger=ledger,
        guard=Guard(registry, views, f"gateway/{server}", guard_seconds),
        registry=RegistryAccess(registry),
    )


def registry_look(registry: "Registry", base_name: str, fingerprint: "Fingerprint | None" = None) -> Look:
    """Return what looks whether a registry has changed and reads its view if so."""

    def look(known: int | None) -> ServingView | None:
        with registry.database.reading() as session:
            if known is not None and revision_of(session) == known:
                return None
            return read_view(session, base_name=base_name, fingerprint=fingerprint)

    return look
