"""`luthier registry`: the list of its subcommands. One file for each group of them; the room does the work."""

import typer

from luthier.cli import (
    registry_add,
    registry_data,
    registry_erase,
    registry_lineage,
    registry_look,
    registry_rebase,
    registry_share,
    registry_store,
)

registry_app = typer.Typer(
    help="Versions of adapters: where they came from, who owns them, whether their bytes are sound.",
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
registry_app.command("export-card")(registry_share.export_card)
registry_app.command("export-bom")(registry_share.export_bom)
registry_app.command("export")(registry_share.export)
registry_app.command("push")(registry_share.push)
registry_app.command("pull")(registry_share.pull)
registry_app.command("rebase")(registry_rebase.rebase)
registry_app.add_typer(registry_data.data_app, name="data")
registry_app.command("trained-on")(registry_lineage.trained_on)
registry_app.command("lineage")(registry_lineage.lineage)
registry_app.add_typer(registry_erase.erase_app, name="erase")
