"""What the registry's commands share: their options, who calls, and opening the registry."""

import getpass
import os
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from luthier.registry.place import Registry

REGISTRY = typer.Option(
    None, "--registry", metavar="PLACE", help="Folder, sqlite:///FILE or postgresql://...?blobs=PLACE. Default: LUTHIER_REGISTRY."
)
ACTOR = typer.Option(None, "--actor", help="Who does this, for the record. Default: LUTHIER_ACTOR, or the user of the system.")
VERSION = typer.Argument(metavar="NAME[:VERSION|:ALIAS]", help="A version; the name alone where there is only one.")


def opened(place: str | None, *, create: bool = False) -> "Registry":
    """Return the registry at a place, or at the default one."""
    from luthier.registry.place import open_registry

    return open_registry(place, create=create)


def caller(actor: str | None) -> str:
    """Return who is told in the record to have done this."""
    return actor or os.environ.get("LUTHIER_ACTOR") or getpass.getuser()


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
