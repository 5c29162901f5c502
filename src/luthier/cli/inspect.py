"""`luthier inspect`: what is in an adapter folder, without loading its base."""

import typer

from luthier.cli.output import JSON, make_console, print_json


def inspect(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    layers: bool = typer.Option(False, help="List every adapted layer with the size of its update."),
    as_json: bool = JSON,
) -> None:
    """Show an adapter's configuration, size, base, recipe and the size of its updates; fails if the folder is damaged."""
    console = make_console(as_json)
    from rich.table import Table

    from luthier.cli.loading import adapter_folder
    from luthier.formats.contents import describe_adapter
    from luthier.formats.folder import read_adapter

    found = describe_adapter(read_adapter(adapter_folder(adapter)))
    if as_json:
        print_json(found)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for key in ("folder", "base", "fingerprint", "method", "targets", "parameters", "size", "tensors", "trained by"):
        if found[key]:
            table.add_row(key, str(found[key]))
    for key, value in {**found["metrics"], **found["recipe"]}.items():
        table.add_row(key, str(value))
    console.print(table)
    if layers:
        listing = Table("layer", "r", "|delta|", "|A|", "|B|")
        for layer in found["layers"]:
            listing.add_row(layer["path"], str(layer["r"]), *(f"{layer[key]:.4f}" for key in ("delta_norm", "A_norm", "B_norm")))
        console.print(listing)
    elif found["layers"]:
        norms = sorted(layer["delta_norm"] for layer in found["layers"])
        console.print(f"{len(norms)} layers, |delta| from {norms[0]:.3f} to {norms[-1]:.3f}; --layers lists them")
