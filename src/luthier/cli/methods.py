"""`luthier methods`: what each method and init does, and when to use it."""

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.core.errors import ConfigError, did_you_mean


def methods(
    name: str | None = typer.Argument(None, help="Explain only this one."),
    as_json: bool = JSON,
) -> None:
    """Explain the methods and inits that `luthier train` knows, with when to use each and how to ask for it."""
    console = make_console(as_json)
    from rich.table import Table

    from luthier.core.methods import CATALOGUE

    shown = [method for method in CATALOGUE if name in (None, method.name)]
    if not shown:
        known = [method.name for method in CATALOGUE]
        raise ConfigError(f"there is no method {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}")
    if as_json:
        keys = ("name", "kind", "what", "when", "source", "settings", "flag")
        print_json({"methods": [{key: getattr(method, key) for key in keys} for method in shown]})
        return
    for kind, title in (("method", "ways to adapt: luthier train --method"), ("init", "ways to begin: luthier train --init")):
        table = Table.grid(padding=(0, 2, 1, 0))
        table.add_column(style="bold")
        table.add_column()
        for method in (method for method in shown if method.kind == kind):
            table.add_row(method.name, f"{method.what}\nWhen: {method.when}\n{method.source}")
        if table.row_count:
            console.rule(title, align="left")
            console.print(table, highlight=False)
