"""`luthier registry`: the list of its subcommands. One file for each group of them; the room does the work."""

import typer

from luthier.cli import (
    registry_add,
    registry_experiments,
    registry_look,
    registry_record,
    registry_serving,
    registry_store,
    registry_surfaces,
)

registry_app = typer.Typer(
    help="Versions of adapters: where they came from, who owns them, whether their bytes are sound, and what may go out.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
registry_app.command("add")(registry_add.add)
registry_app.command("list")(registry_look.list_registered)
registry_app.command("show")(registry_look.show)
registry_app.command("search")(registry_look.search)
registry_app.command("verify")(registry_store.verify)
registry_app.command("gc")(registry_store.gc)
registry_app.command("doctor")(registry_store.doctor)
registry_app.add_typer(registry_surfaces.surface_app, name="surface")
registry_app.command("gate")(registry_serving.gate)
registry_app.command("scores")(registry_serving.scores)
registry_app.command("approve")(registry_surfaces.approve)
registry_app.command("hold")(registry_surfaces.hold)
registry_app.command("release")(registry_surfaces.release)
registry_app.command("promote")(registry_serving.promote)
registry_app.command("rollback")(registry_serving.rollback)
registry_app.command("retire")(registry_serving.retire)
registry_app.command("production")(registry_serving.production)
registry_app.add_typer(registry_experiments.experiment_app, name="experiment")
registry_app.command("diff")(registry_record.diff)
registry_app.command("keygen")(registry_record.keygen)
registry_app.command("sign")(registry_record.sign)
registry_app.command("audit")(registry_record.audit)
