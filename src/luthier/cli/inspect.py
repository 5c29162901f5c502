"""`luthier inspect`: what is in an adapter folder and what the adapter learned; no model is built for that."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.core.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from luthier.inspect.report import Table
    from luthier.models import Checkpoint

NO_BASE = "none"


def inspect(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    layers: bool = typer.Option(False, help="List every adapted layer: size, singular values, ranks, share of its weight."),
    base: str | None = typer.Option(
        None, help="Base model to measure against; the adapter's own if it is on this machine. 'none': leave it out."
    ),
    energy: float = typer.Option(0.95, help="Share of |dW|^2 that a suggested rank keeps."),
    against: str | None = typer.Option(None, help="Another adapter: how much the directions of the two have in common."),
    plot: Path | None = typer.Option(None, help="Folder for pictures: spectra, sizes over blocks and modules, similarity."),
    html: Path | None = typer.Option(None, help="File for one report with all of it, to be opened without a network."),
    as_json: bool = JSON,
) -> None:
    """Show an adapter's configuration, recipe, size and spectra; fails if the folder is damaged."""
    console = make_console(as_json)
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}; it is a share, above 0 and at most 1")
    from luthier.cli.loading import adapter_folder
    from luthier.core.atomic import write_atomic
    from luthier.formats.contents import describe_adapter
    from luthier.formats.folder import read_adapter
    from luthier.inspect import adapter_spectra, compare_adapters, draw, html_report
    from luthier.inspect.report import layer_table, other_table, similarity_table

    folder = read_adapter(adapter_folder(adapter))
    found = describe_adapter(folder)
    weights, without = None, ""
    if layers or as_json or plot or html or base:
        weights, without = _base_weights(base, found["base"], console)
    spectra = adapter_spectra(folder, weights and weights.find, share=energy)
    remarks = [*spectra.remarks, *([f"No share of the base's weight: {without}."] if without else [])]
    similarity = compare_adapters(folder, read_adapter(adapter_folder(against))) if against else None
    pictures = draw(spectra, similarity) if plot or html else {}
    if plot:
        for name, picture in pictures.items():
            write_atomic(plot / name, picture)
    shown = ("folder", "base", "fingerprint", "method", "targets", "besides", "parameters", "size", "tensors")
    facts = {key: found[key] for key in shown}
    facts |= {"trained by": found["trained by"], **found["metrics"], **found["recipe"]}
    if html:
        write_atomic(html, html_report(f"Adapter {folder.path.name}", facts, spectra, remarks, similarity, pictures))

    if as_json:
        measured = spectra.as_dict() | {"remarks": remarks}
        print_json(
            found | measured | {"similarity": similarity and similarity.as_dict(), "plots": sorted(pictures) if plot else []}
        )
        return
    _print_facts(console, facts)
    if layers:
        for table in (layer_table(spectra.layers, energy), other_table(spectra.others)):
            _print_table(console, table)
        for remark in remarks:
            console.print(remark)
    elif spectra.layers:
        norms = sorted(layer.delta_norm for layer in spectra.layers)
        needed = sorted(layer.suggested_rank for layer in spectra.layers)
        console.print(f"{len(norms)} layers, |delta| from {norms[0]:.3f} to {norms[-1]:.3f}; --layers lists them")
        console.print(f"ranks that hold {energy:.4g} of |delta|^2: from {needed[0]} to {needed[-1]}")
    if similarity is not None:
        _print_table(console, similarity_table(similarity.layers))
        if alone := [*similarity.only_first, *similarity.only_second]:
            console.print(f"{len(alone)} layers have a pair in one of the two only, such as {alone[0]}")
    for written in (plot if pictures else None, html):
        if written:
            console.print(f"written: {written}")


def _base_weights(asked: str | None, own: str | None, console: Any) -> "tuple[Checkpoint | None, str]":
    """Return the base's weights, or None and why. Only a base that was named in this call is fetched."""
    from luthier.models import Checkpoint, pull, pulled

    if asked == NO_BASE:
        return None, "left out, as asked"
    if asked is not None:
        return Checkpoint(pull(asked, progress=lambda message: console.print(message, style="dim"))), ""
    if not own:
        return None, "the adapter does not name its base; say it with --base"
    try:
        here = pulled(own)
    except ModelError:
        here = None
    if here is None:
        return None, f"the adapter's base, {own}, is not on this machine; --base {own} fetches it, --base FOLDER names a copy"
    return Checkpoint(here), ""


def _print_facts(console: Any, facts: dict[str, Any]) -> None:
    from rich.table import Table as Grid

    grid = Grid.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for key, value in facts.items():
        if value:
            grid.add_row(key, str(value))
    console.print(grid)


def _print_table(console: Any, table: "Table") -> None:
    from rich.box import SIMPLE
    from rich.table import Table as Grid

    head, rows = table
    if not rows:
        return
    grid = Grid(box=SIMPLE, padding=0, collapse_padding=True)
    for index, name in enumerate(head):
        grid.add_column(name, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
