"""`luthier registry add`: a folder becomes a version."""

from pathlib import Path

import typer

from luthier.cli.output import JSON, make_console, print_json
from luthier.cli.registry_opening import ACTOR, REGISTRY, caller, fingerprint_of_base, opened


def add(
    folder: Path = typer.Argument(help="The adapter's folder, or the folder of a run."),
    name: str = typer.Option(..., "--name", "-n", help="The adapter that it becomes a version of, such as team/orders."),
    owner: str | None = typer.Option(None, help="Who answers for the adapter; needed where the name is new."),
    data: list[str] = typer.Option(
        [],
        "--data",
        metavar="NAME:VERSION[=ROLE]",
        help="What it learned from: train (the default), preference, calibration, eval.",
    ),
    no_data: str | None = typer.Option(None, "--no-data", metavar="REASON", help="Why no data set can be named."),
    parent: list[str] = typer.Option(
        [],
        "--parent",
        metavar="NAME:VERSION[=RELATION]",
        help="What it was made from: continued (the default), merged, distilled, ...",
    ),
    base: str | None = typer.Option(None, help="Base model to fingerprint, for a folder that brings no fingerprint."),
    license: str | None = typer.Option(None, help="Licence of the adapter."),
    intended_use: str | None = typer.Option(None, help="What it is for."),
    limitations: str | None = typer.Option(None, help="What it is not for, and where it fails."),
    consent: str | None = typer.Option(None, help="Where a likeness was trained on: whose permission, and where it is kept."),
    tenant: str | None = typer.Option(None, help="Whose adapter it is, where one registry serves several."),
    run_id: str | None = typer.Option(None, help="The run that made it."),
    actor: str | None = ACTOR,
    registry: str | None = REGISTRY,
    as_json: bool = JSON,
) -> None:
    """Add an adapter's folder as the next version of its name; the same folder again is the version that is there.

    Of a run's folder the data, recipe, scores and environment are recorded without --data: what it was trained on is added as
    data sets, where the registry does not know these rows yet.
    """
    console = make_console(as_json)
    from luthier.registry.registering import About
    from luthier.registry.runs import register_run

    store = opened(registry, create=True)
    done = register_run(
        store,
        folder,
        name=name,
        actor=caller(store, actor, "register"),
        owner=owner,
        tenant=tenant,
        datasets=[_pair(named, "train") for named in data],
        no_data_reason=no_data,
        parents=[_pair(named, "continued") for named in parent],
        base=fingerprint_of_base(base, console) if base else None,
        base_name=base,
        about=About(license, intended_use, limitations, consent),
        run_id=run_id,
    )
    what = "registered" if done.is_new else "was registered already, with the same files and origin"
    console.print(f"{done.reference} {what} (manifest {done.manifest_digest[:16]})", highlight=False, soft_wrap=True)
    if as_json:
        print_json({"name": done.name, "version": done.version, "manifest": done.manifest_digest, "is_new": done.is_new})


def _pair(named: str, default: str) -> tuple[str, str]:
    reference, equals, word = named.partition("=")
    return reference, word if equals else default
