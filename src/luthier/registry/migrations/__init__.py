"""How the tables came to be, step by step: one file in `versions/` for each change of the schema, never edited afterwards.

`migrate` brings a database of any age to the present. A new step is a file there whose `down_revision` is the last one's
`revision`; SQLite alters a table by copying it, so changes go through `op.batch_alter_table`. A test holds the steps and
`schema.py` together.
"""

from pathlib import Path
from typing import Any

from alembic.command import upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from luthier.core.errors import RegistryError
from luthier.registry.database import Database, lock_key

FOLDER = Path(__file__).parent


def newest_revision() -> str:
    """Return the revision that this version of luthier works with."""
    newest = ScriptDirectory(str(FOLDER)).get_current_head()
    assert newest is not None
    return newest


def current_revision(database: Database) -> str | None:
    """Return the revision of a database, None where it has no tables yet."""
    with database.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def migrate(database: Database) -> bool:
    """Bring the tables to the present revision; returns whether anything was done. Of several callers one does it.

    All steps happen together or not at all. Raises: RegistryError if a newer luthier has been here.
    """
    if current_revision(database) == newest_revision():
        return False
    # A connection of its own: SQLite copies a table to alter it, and must not take the rows that point to it along.
    with database.engine.execution_options(luthier_writes=True).connect() as connection:
        driver: Any = connection.connection.dbapi_connection
        if database.is_sqlite:
            driver.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():
                return _upgrade(connection)
        finally:
            if database.is_sqlite:
                driver.execute("PRAGMA foreign_keys=ON")


def _upgrade(connection: Connection) -> bool:
    is_sqlite = connection.dialect.name == "sqlite"
    if not is_sqlite:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": lock_key("schema")})
    before = MigrationContext.configure(connection).get_current_revision()
    if before == newest_revision():  # another process was first
        return False
    known = {step.revision for step in ScriptDirectory(str(FOLDER)).walk_revisions()}
    if before is not None and before not in known:
        raise RegistryError(f"This registry has schema {before}, which this luthier does not know. Install a newer luthier.")
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    upgrade(config, "head")
    if is_sqlite and (lost := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()):
        raise RegistryError(f"The registry was not migrated: {len(lost)} rows would point nowhere, such as one of {lost[0][0]}")
    return True
