"""A PostgreSQL of the tests' own: a cluster in a temporary folder, reached through a socket there, gone afterwards.

PostgreSQL refuses to run as root, so where the tests do it runs as `postgres` (Debian's package makes that user), or as `nobody`.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, text


def postgres_programs() -> Path | None:
    """Return the folder of PostgreSQL's programs, newest version first, or None where it is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    if found := next((folder for folder in folders if (folder / "initdb").is_file()), None):
        return found
    program = shutil.which("initdb")
    return Path(program).resolve().parent if program else None


@contextmanager
def running_postgres(programs: Path) -> Iterator[str]:
    """Give the URL of a fresh cluster; its files and processes are gone when the block ends."""
    home = Path(tempfile.mkdtemp(prefix="luthier-pg-"))
    identity = _identity()
    if identity:
        os.chown(home, identity["user"], identity["group"])
    data = home / "data"

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, **identity, check=False
        )
        assert done.returncode == 0, f"{command[0]}: {done.stdout}{done.stderr}"

    try:
        run(str(programs / "initdb"), "-D", str(data), "-U", "luthier", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off -c max_connections=60"
        log = str(home / "log")
        run(str(programs / "pg_ctl"), "-D", str(data), "-l", log, "-o", settings, "-w", "start")
        try:
            yield f"postgresql+psycopg://luthier@/postgres?host={home}"
        finally:
            run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def fresh_database(server_url: str, template: str = "template0") -> Iterator[str]:
    """Give the URL of an empty database on that server, or of a copy of one; it is dropped when the block ends."""
    name = f"r{uuid.uuid4().hex[:12]}"
    engine = create_engine(server_url, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
        yield server_url.replace("/postgres?", f"/{name}?")
        with engine.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    finally:
        engine.dispose()


def _identity() -> dict[str, Any]:
    """Who PostgreSQL runs as, in subprocess's words; nothing where that is whoever runs the tests."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
