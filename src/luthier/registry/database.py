"""Open the registry's database: SQLite by default, PostgreSQL by URL.

SQLite's own transactions lose writers: of 240 inserts that 6 processes made by reading the highest number first, 70 to 140
failed, even with a busy timeout. In WAL mode with BEGIN IMMEDIATE for whoever writes, none did. So there are two ways in:
`reading` never blocks and never locks, `writing` takes the one write lock first. SQLite's own wait for that lock asks again and
again, and is not fair: of 8 writers on a busy machine one got no turn within 60 seconds. So writers queue for a lock of the
kernel's on a file beside the database, which wakes them in turn and lets go when its holder dies. On PostgreSQL both are
ordinary transactions, and whoever takes a number locks the row that holds it. What has no row to lock (the end of the audit
chain, the schema, the store of blobs against its sweeper) has a lock of its own: `take_lock`.
"""

import fcntl
import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, create_engine, event, inspect, text
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session

from luthier.core.errors import MissingExtraError, RegistryError
from luthier.registry.columns import Row

BUSY_SECONDS = 60.0
PATIENCE = {
    "connect_timeout": 10,
    "tcp_user_timeout": 30_000,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}
"""libpq's settings (seconds, one in milliseconds), where the URL does not say others: a server that vanished without a word is
noticed within a minute, not after two hours.
"""
_mine = threading.local()


@dataclass(frozen=True)
class Database:
    """A database with its two ways in."""

    url: URL
    engine: Engine

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Give a session that sees one state of the registry and writes nothing."""
        # SQLite shows one state for as long as a transaction lasts, PostgreSQL by default another one to every statement.
        engine = self.engine if self.is_sqlite else self.engine.execution_options(isolation_level="REPEATABLE READ")
        with Session(engine) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Give a session whose changes are kept together when the block ends, or not at all when it raises."""
        engine = self.engine.execution_options(luthier_writes=True)
        with self._turn(), Session(engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self.is_sqlite or not self.url.database:
            yield
            return
        file = f"{self.url.database}.lock"
        held = _mine.__dict__.setdefault("held", set())
        assert file not in held, "a writing session inside a writing session would wait for itself for ever"
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            held.add(file)
            yield
        finally:
            held.discard(file)
            os.close(handle)


def open_database(url: str) -> Database:
    """Return the database at an SQLAlchemy URL; tables are `migrate`'s job.

    Raises: RegistryError for a URL that is none of SQLite's or PostgreSQL's, MissingExtraError without PostgreSQL's driver.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise RegistryError(f"{url!r} is not a database URL; needed sqlite:///FILE or postgresql://USER@HOST/NAME") from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise RegistryError(f"{parsed.drivername} databases cannot hold a registry; needed sqlite:///FILE or postgresql://...")
    if parsed.get_backend_name() == "sqlite":
        engine = create_engine(parsed, connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False})
        event.listen(engine, "connect", _settle_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        try:
            patience = {name: value for name, value in PATIENCE.items() if name not in parsed.query}
            engine = create_engine(parsed, pool_pre_ping=True, connect_args=patience)
        except ModuleNotFoundError as error:
            raise MissingExtraError("psycopg", "postgres", "A registry on PostgreSQL") from error
    return Database(parsed, engine)


def take_lock(session: Session, name: str, *, shared: bool = False) -> None:
    """Hold the lock `name` until the writing session ends; several may hold a `shared` one, which keeps others out.

    On SQLite a writing session has the whole database to itself already.
    """
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text(f"SELECT pg_advisory_xact_lock{'_shared' if shared else ''}(:key)"), {"key": lock_key(name)})


@contextmanager
def walking(session: Session) -> Iterator[None]:
    """Have PostgreSQL answer by indexes while the block runs, as SQLite does; for walks from row to row.

    Its planner takes each step of a recursion to find ten times as much as the last. So it expects 100,000 rows where 100 come,
    and reads whole tables for them: a question then costs as much as the registry is large, whatever its answer.
    """
    if session.get_bind().dialect.name != "postgresql":
        yield
        return
    setting = text(
        "SELECT set_config('enable_seqscan', :on, true), set_config('enable_hashjoin', :on, true), "
        "set_config('enable_mergejoin', :on, true)"
    )
    session.execute(setting, {"on": "off"})
    yield
    session.execute(setting, {"on": "on"})  # not after an error: that ended the transaction, and the settings with it


def add_if_absent(session: Session, table: type[Row], **values: Any) -> bool:
    """Add a row unless one with its key is there, whoever adds it at this moment; returns whether it was added."""
    return bool(add_new(session, table, [values]))


def add_new(session: Session, table: type[Row], rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Add the rows whose keys are not there yet and return these keys. Two writers of the same rows need one order for them."""
    statement = insert_into(session, table).on_conflict_do_nothing().returning(*inspect(table).primary_key)
    return [tuple(row) for row in session.execute(statement, list(rows))] if rows else []


def insert_into(session: Session, table: type[Row]) -> Any:
    """Return an INSERT in this database's words, which can say what happens to a row whose key is there already.

    It goes past the ORM, which would compile it anew for each number of rows: 500 took ten times as long.
    """
    insert = sqlite_insert if session.get_bind().dialect.name == "sqlite" else postgresql_insert
    return insert(table.metadata.tables[table.__tablename__])


def lock_key(name: str) -> int:
    """Return the number under which PostgreSQL knows a lock."""
    return int.from_bytes(hashlib.sha256(f"luthier {name}".encode()).digest()[:8], "big", signed=True)


def _settle_sqlite(connection: Any, _record: Any) -> None:
    assert isinstance(connection, sqlite3.Connection)
    connection.isolation_level = None  # no BEGIN of the driver's own: `_begin_sqlite` says which
    cursor = connection.cursor()
    for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("luthier_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
