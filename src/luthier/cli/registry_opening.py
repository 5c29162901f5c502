"""What the registry's commands share: their options, who calls, and opening the registry."""

import getpass
import os
from typing import TYPE_CHECKING, Any

import typer

from luthier.core.errors import ConfigError, RefusedError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from luthier.registry.place import Registry

REGISTRY = typer.Option(
    None, "--registry", metavar="PLACE", help="Folder, sqlite:///FILE or postgresql://...?blobs=PLACE. Default: LUTHIER_REGISTRY."
)
ACTOR = typer.Option(
    None,
    "--actor",
    help="Who does this, for the record. Default: LUTHIER_ACTOR, or the user of the system. A registry that asks for keys takes "
    "LUTHIER_API_KEY instead.",
)
API_KEY = "LUTHIER_API_KEY"
VERSION = typer.Argument(metavar="NAME[:VERSION|:ALIAS]", help="A version; the name alone where there is only one.")


def opened(place: str | None, *, create: bool = False) -> "Registry":
    """Return the registry at a place, or at the default one."""
    from luthier.registry.place import open_registry

    return open_registry(place, create=create)


def caller(store: "Registry", actor: str | None, scope: str) -> str:
    """Return who is told in the record to have done this: by key where the registry asks for keys, by name elsewhere.

    Raises: RefusedError without a key that works and has the scope, ConfigError for a name beside it.
    """
    from luthier.registry.tenancy import Scope
    from luthier.registry.tenants import authenticate, needs_key

    with store.database.reading() as session:
        if not needs_key(session, Scope(scope)):
            return actor or os.environ.get("LUTHIER_ACTOR") or getpass.getuser()
        if actor is not None:
            raise ConfigError("--actor counts for nothing here: this registry asks for keys, and the key says who. Leave it out.")
        if not (key := os.environ.get(API_KEY)):
            raise RefusedError(
                f"This registry asks for keys, and {API_KEY} is not set. It takes one with the scope {scope}; whoever has a key "
                f"with the scope admin makes one: luthier tenants keys issue TENANT NAME --scope {scope}"
            )
        return authenticate(session, key, Scope(scope)).actor


def fingerprint_of_base(model: str, console: "Console") -> dict[str, Any]:
    """Load a base model and return its fingerprint as JSON."""
    from luthier.cli.loading import load
    from luthier.formats.adapters import fingerprint_of

    loaded = load(model, None, dtype="auto", console=console)
    return fingerprint_of(loaded.base.model).model_dump(mode="json")


def table_of(*columns: str) -> "Table":
    """Return an empty table; columns whose title begins with '#' hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column.removeprefix("#"), justify="right" if column.startswith("#") else "left", overflow="fold")
    return table
