"""The `luthier` command: the list of its subcommands, and what happens to an error."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import typer

from luthier.cli import (
    baseline,
    bench_serve,
    chat,
    contamination,
    evaluate,
    gate,
    generate,
    inspect,
    merge,
    methods,
    models,
    plan,
    quickstart,
    registry,
    runs,
    serve,
    sweep,
    tenants,
    train,
    truncate,
)
from luthier.cli.output import print_json_error, report_error
from luthier.core.errors import LuthierError
from luthier.core.threads import spin_briefly
from luthier.train.launching import die_with_launcher, process_of

# What typer raises for a command line that makes no sense. It carries a copy of click of its own and gives this class no
# public name; BadParameter is the nearest that has one.
UsageError: Any = typer.BadParameter.__bases__[0]
INTERRUPTED = 130

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
app.command("contamination")(contamination.contamination)
app.command("gate")(gate.gate)
app.command("merge")(merge.merge)
app.command("inspect")(inspect.inspect)
app.command("truncate")(truncate.truncate)
app.command("sweep")(sweep.sweep)
app.command("learning-curve")(sweep.learning_curve)
app.command("baseline")(baseline.baseline)
app.command("methods")(methods.methods)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.command("chat")(chat.chat)
app.command("bench-serve")(bench_serve.bench_serve)
app.add_typer(models.app, name="models")
app.add_typer(runs.runs_app, name="runs")
app.add_typer(registry.registry_app, name="registry")
app.add_typer(tenants.tenants_app, name="tenants")


@app.callback(invoke_without_command=True)
def version(
    context: typer.Context,
    show: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True),
) -> None:
    """Answer --version; every other call goes to its command."""
    if show:
        from luthier import __version__

        typer.echo(__version__)
        raise typer.Exit


def _among_others() -> AbstractContextManager[Any]:
    """Join the other processes of a run, so that an error that all of them have is told by one."""
    from luthier.train.processes import joined

    return joined()


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 it failed, 2 it was asked wrongly, 130 interrupted."""
    # Before torch is loaded: OpenMP threads that spin while they wait for each other take the processor from whatever else
    # runs. On a busy two-core machine a training step took three to seven times as long with them.
    if sys.argv[1:2] in (["serve"], ["generate"]):
        spin_briefly(os.environ)
    else:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    die_with_launcher()
    rank, size = process_of(os.environ)
    as_json = "--json" in sys.argv
    try:
        with _among_others() if size > 1 and sys.argv[1:2] == ["train"] else nullcontext():
            status = app(prog_name="luthier", standalone_mode=False) or 0
    except LuthierError as error:
        status = report_error(error, as_json=as_json)
    except UsageError as error:
        if as_json and rank == 0:
            print_json_error("UsageError", error.format_message())
        if rank == 0:
            error.show()
        status = 2
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED and rank == 0:
        typer.echo("interrupted", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
