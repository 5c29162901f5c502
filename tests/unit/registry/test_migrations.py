"""The steps in `migrations/` make the tables of `schema.py`, on SQLite and PostgreSQL, and keep what is in them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.command import upgrade
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from luthier.core.errors import RegistryError
from luthier.registry import migrations, schema
from luthier.registry.columns import Row
from luthier.registry.database import Database, open_database
from luthier.registry.experiments import count_units, exposures
from luthier.registry.migrations import current_revision, migrate, newest_revision

# Rows as the first schema holds them, written without our models: those change, this database does not.
FIRST_ROWS = [
    "INSERT INTO adapter (id, name, owner, description, next_version, created_at, created_by)"
    " VALUES (1, 'orders', 'team', '', 2, '2026-11-24 10:00:00', 'ann')",
    "INSERT INTO blob (digest, size, state, created_at) VALUES ('ab', 5, 'present', '2026-11-24 10:00:00')",
    "INSERT INTO adapter_version (id, adapter_id, version, manifest_digest, lineage_digest, peft_type, rank, alpha,"
    " num_parameters, target_modules, size_bytes, lifecycle, no_data_reason, recipe, metrics, environment, created_at,"
    " created_by)"
    " VALUES (1, 1, 1, 'ab', 'cd', 'LORA', 8, 16, 40, '[]', 160, 'candidate', 'old', '{}', '{}', '{}',"
    " '2026-11-24 10:00:00', 'ann')",
    "INSERT INTO adapter_file (version_id, path, blob_digest, size) VALUES (1, 'adapter_model.safetensors', 'ab', 5)",
    "INSERT INTO surface (id, name, audience, owner, rules, created_at)"
    " VALUES (1, 'shop', 'customer', 'ann', '{}', '2026-11-24 10:00:00')",
    "INSERT INTO experiment (id, surface_id, name, salt, unit, epoch, guardrail, started_at)"
    " VALUES (1, 1, 'first', 'salt', 'user', 1, '{\"control\": 1, \"rule\": null}', '2026-11-24 10:00:00')",
    "INSERT INTO exposure (experiment_id, epoch, version_id, count) VALUES (1, 1, 1, 40)",
]


def differences(database: Database) -> list[object]:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return compare_metadata(context, Row.metadata)


@pytest.fixture
def database(database_url: str):
    opened = open_database(database_url)
    yield opened
    opened.engine.dispose()


def test_the_steps_make_the_tables_of_the_models(database: Database) -> None:
    assert current_revision(database) is None
    assert migrate(database)
    assert differences(database) == []
    assert current_revision(database) == newest_revision()
    assert not migrate(database)


def test_a_table_that_no_step_makes_is_seen(database: Database) -> None:
    migrate(database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE surface DROP COLUMN owner"))
    assert any("owner" in str(difference) for difference in differences(database))


def test_a_database_of_the_first_schema_keeps_its_rows(database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    with database.engine.execution_options(luthier_writes=True).begin() as connection:
        config.attributes["connection"] = connection
        upgrade(config, "0001")
        for row in FIRST_ROWS:
            connection.execute(sa.text(row))
    migrate(database)
    assert differences(database) == []
    with database.reading() as session:
        version = session.scalars(sa.select(schema.AdapterVersion)).one()
        assert (version.adapter.name, version.version, version.rank, version.alpha) == ("orders", 1, 8, 16.0)
        assert [file.path for file in version.files] == ["adapter_model.safetensors"]
    # What is counted from now on is added to what was counted before.
    assert count_units(database, 1, 1, {bytes(32): 1}) == 1
    with database.reading() as session:
        assert exposures(session, session.get_one(schema.Experiment, 1)) == {1: 41}


def test_a_later_step_copies_tables_without_losing_what_points_to_them(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A step as a later release may bring one: it alters the table that all others point to.
    migrate(database)
    with database.engine.execution_options(luthier_writes=True).begin() as connection:
        for row in FIRST_ROWS:
            connection.execute(sa.text(row))
    later = tmp_path / "migrations"
    shutil.copytree(migrations.FOLDER, later, ignore=shutil.ignore_patterns("__pycache__"))
    (later / "versions/next.py").write_text(
        f"import sqlalchemy as sa\nfrom alembic import op\nrevision = 'next'\ndown_revision = '{newest_revision()}'\n"
        "def upgrade():\n"
        "    with op.batch_alter_table('adapter_version') as table:\n"
        "        table.alter_column('run_id', new_column_name='run', existing_type=sa.String(255))\n"
        "        table.create_unique_constraint('uq_adapter_version_run', ['run'])\n"
    )
    monkeypatch.setattr(migrations, "FOLDER", later)
    assert migrate(database)
    with database.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT run, version FROM adapter_version")).all() == [(None, 1)]
        assert connection.execute(sa.text("SELECT count(*) FROM adapter_file")).scalar() == 1
        if database.is_sqlite:
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_step_that_fails_leaves_nothing(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    migrate(database)
    later = tmp_path / "migrations"
    shutil.copytree(migrations.FOLDER, later, ignore=shutil.ignore_patterns("__pycache__"))
    (later / "versions/next.py").write_text(
        f"from alembic import op\nrevision = 'next'\ndown_revision = '{newest_revision()}'\n"
        "def upgrade():\n    op.drop_table('outbox')\n    op.execute('SELECT no_such_column FROM adapter')\n"
    )
    before = newest_revision()
    monkeypatch.setattr(migrations, "FOLDER", later)
    with pytest.raises(sa.exc.DatabaseError):
        migrate(database)
    assert current_revision(database) == before
    assert differences(database) == []


def test_a_newer_schema_is_refused(database: Database) -> None:
    migrate(database)
    with database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryError, match=r"schema 9999.*newer luthier"):
        migrate(database)


def test_processes_that_come_at_once_make_the_tables_once(database_url: str) -> None:
    script = (
        "import sys; from luthier.registry.database import open_database; from luthier.registry.migrations import migrate\n"
        "sys.stdin.readline(); print(migrate(open_database(sys.argv[1])))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in started]
    assert sorted(out.strip() for out, _ in told) == ["False", "False", "False", "True"], [err for _, err in told]


def test_every_step_follows_the_one_before() -> None:
    steps = list(ScriptDirectory(str(migrations.FOLDER)).walk_revisions())
    assert [step.down_revision for step in steps][-1] is None
    assert all(re.fullmatch(r"\d{4}", step.revision) for step in steps)
