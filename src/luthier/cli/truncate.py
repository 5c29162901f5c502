"""`luthier truncate`: an adapter of lower rank, and how far it is from the given one."""

from pathlib import Path

import typer

from luthier.cli.output import JSON, make_console, print_json


def truncate(
    adapter: str = typer.Argument(help="Adapter folder, or the folder of a run."),
    out: Path = typer.Option(..., "--out", "-o", help="New folder for the truncated adapter."),
    rank: int | None = typer.Option(None, help="Ranks to keep in every layer that has more."),
    energy: float | None = typer.Option(None, help="Instead of --rank: keep in each layer what holds this share of |dW|^2."),
    layers: bool = typer.Option(False, "--layers", help="List every layer."),
    as_json: bool = JSON,
) -> None:
    """Write an adapter of lower rank, as near to the given one as that rank allows, and say how near that is."""
    console = make_console(as_json)
    from rich.table import Table

    from luthier.cli.loading import adapter_folder
    from luthier.compose import truncate as write_truncated

    done = write_truncated(adapter_folder(adapter), out, rank=rank, energy=energy)
    if layers:
        table = Table("layer", "r", "error foretold", "measured")
        for layer in done.layers:
            errors = (f"{error / layer.norm if layer.norm else 0.0:.2%}" for error in (layer.predicted, layer.measured))
            table.add_row(layer.path, f"{layer.r_before} -> {layer.r_after}", *errors)
        console.print(table)
    else:
        ranks = [layer.r_after for layer in done.layers]
        console.print(f"{len(ranks)} layers, ranks from {min(ranks)} to {max(ranks)}; --layers lists them")
    for note in sorted({layer.note for layer in done.layers if layer.note}):
        told = [layer.path for layer in done.layers if layer.note == note]
        console.print(f"{note}: {told[0]}" + (f" and {len(told) - 1} more" if len(told) > 1 else ""))
    before, after = done.num_parameters
    console.print(f"{done.out}: {after:,} of {before:,} numbers left.")
    console.print(f"|before - after| is {done.measured:.3%} of |dW| over all layers ({done.predicted:.3%} foretold).")
    if done.caveat:
        console.print(done.caveat)
    console.print(f"What that means for its answers says only: luthier eval {out} --data held-out.jsonl", soft_wrap=True)
    if as_json:
        print_json(
            {
                "out": str(done.out),
                "predicted": done.predicted,
                "measured": done.measured,
                "num_parameters": {"before": before, "after": after},
                "caveat": done.caveat,
                "layers": [vars(layer) for layer in done.layers],
            }
        )
