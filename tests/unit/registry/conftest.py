"""What the registry's tests share: registries in temporary folders, on SQLite and on a real PostgreSQL.

The tables are made once for each kind of database and then copied, which takes a tenth of the time.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url
from tests.postgres import fresh_database, postgres_programs, running_postgres

from luthier.registry.place import FILE, Registry, open_registry


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


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.sqlite3'}"
    url: str = request.getfixturevalue("postgres_url")
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SQLite file with the registry's tables."""
    folder = tmp_path_factory.mktemp("template")
    open_registry(folder, create=True).database.engine.dispose()
    return folder / FILE


@pytest.fixture(scope="session")
def postgres_template(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the name of a PostgreSQL database with the registry's tables."""
    with fresh_database(postgres_server) as url:
        open_registry(f"{url}&blobs={tmp_path_factory.mktemp('blobs')}", create=True).database.engine.dispose()
        yield str(make_url(url).database)


@pytest.fixture
def registry(sqlite_template: Path, tmp_path: Path) -> Iterator[Registry]:
    """Return an empty registry in a temporary folder."""
    (tmp_path / "registry").mkdir()
    shutil.copy(sqlite_template, tmp_path / "registry")
    opened = open_registry(tmp_path / "registry")
    yield opened
    opened.database.engine.dispose()


@pytest.fixture
def postgres_registry(
    postgres_server: str, postgres_template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Registry]:
    """Return an empty registry on PostgreSQL, with its blobs and its cache in a temporary folder."""
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    with fresh_database(postgres_server, postgres_template) as url:
        opened = open_registry(f"{url}&blobs={tmp_path / 'blobs'}")
        yield opened
        opened.database.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_registry(request: pytest.FixtureRequest) -> Registry:
    """Return an empty registry, once on SQLite and once on PostgreSQL."""
    found: Registry = request.getfixturevalue("registry" if request.param == "sqlite" else "postgres_registry")
    return found
