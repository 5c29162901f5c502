"""The `luthier` command: the list of its subcommands, and what happens to an error."""

import sys

import typer

from luthier.cli import evaluate, generate, inspect, merge, models, quickstart, train
from luthier.cli.output import report_error
from luthier.core.errors import LuthierError

app = typer.Typer(
    name="luthier",
    help="Train, judge and use LoRA adapters, on ordinary CPUs too. Begin with: luthier quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.add_typer(models.app, name="models")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True),
) -> None:
    if show:
        from luthier import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 it failed, 2 it was asked wrongly, 130 interrupted."""
    try:
        app()
    except LuthierError as error:
        sys.exit(report_error(error, as_json="--json" in sys.argv))
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
