"""What Alembic runs for each upgrade: on the connection it was given, inside the transaction that is open there."""

from alembic import context

from luthier.registry.columns import Row

if hasattr(context, "config"):  # else nobody upgrades, and something that walks the package imported this file
    context.configure(
        connection=context.config.attributes["connection"],
        target_metadata=Row.metadata,
        render_as_batch=True,
        transactional_ddl=True,  # SQLite's too: the driver begins nothing by itself here
    )
    context.run_migrations()
