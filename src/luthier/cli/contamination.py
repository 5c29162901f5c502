"""`luthier contamination`: is what a suite asks among the training rows?"""

import typer

from luthier.cli.output import JSON, make_console, print_json

ITEMS_SHOWN = 5


def contamination(
    train: str = typer.Option(..., "--train", "-d", help="Training rows: a file, or a Hub data set."),
    suite: list[str] = typer.Option(
        ["general"], "--suite", help="'general', one of its parts, or a suite file; may be repeated."
    ),
    as_json: bool = JSON,
) -> None:
    """Look for the items of suites in training rows: 13 words in a row in common, or the whole of a shorter text."""
    console = make_console(as_json)
    from rich.table import Table

    from luthier.data.read import stream_rows
    from luthier.evaluate.contamination import find_contamination
    from luthier.evaluate.shipped import find_suites

    found = find_contamination(stream_rows(train), find_suites(suite))
    table = Table(
        "suite", "items", "checked", "in training rows", "", title=f"{found.rows:,} rows of {train}", title_justify="left"
    )
    for one in found.suites:
        counts = (one.items, one.items - one.unchecked, len(one.overlaps))
        table.add_row(one.suite, *(f"{count:,}" for count in counts), f"{one.share:.1%}")
    console.print(table)
    for one in found.suites:
        for overlap in one.overlaps[:ITEMS_SHOWN]:
            rows = ", ".join(map(str, overlap.rows)) + (", ..." if overlap.num_rows > len(overlap.rows) else "")
            console.print(f"{one.suite}: {overlap.item} ({overlap.share:.0%} of it) in row {rows}", highlight=False)
        if len(one.overlaps) > ITEMS_SHOWN:
            console.print(f"{one.suite}: and {len(one.overlaps) - ITEMS_SHOWN} more; --json lists them all", highlight=False)
    if as_json:
        print_json({"train": train, **found.as_dict()})
