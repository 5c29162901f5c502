"""What the registry's tests share: registries in temporary folders, on SQLite and on a real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.postgres import fresh_database, postgres_programs, running_postgres

from luthier.registry.place import Registry, open_registry


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Return the URL of a PostgreSQL server of the tests' own; skip where it is not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the driver of the extra 'postgres' is not installed")
    with running_postgres(programs) as url:
        yield url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """Return the URL of an empty database on a real PostgreSQL."""
    with fresh_database(postgres_server) as url:
        yield url


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Return an empty registry in a temporary folder."""
    opened = open_registry(tmp_path / "registry", create=True)
    yield opened
    opened.database.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite3'}"
    return request.getfixturevalue("postgres_url")


@pytest.fixture
def any_registry(database_url: str, tmp_path: Path) -> Iterator[Registry]:
    """Return an empty registry, once on SQLite and once on PostgreSQL; its blobs are in a temporary folder."""
    separator = "&" if "?" in database_url else "?"
    opened = open_registry(f"{database_url}{separator}blobs={tmp_path / 'blobs'}", create=True)
    yield opened
    opened.database.engine.dispose()
