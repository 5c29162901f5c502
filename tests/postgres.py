"""A PostgreSQL of the tests' own: a cluster in a temporary folder, reached through a socket there, gone afterwards.

PostgreSQL refuses to run as root, so where the tests do it runs as `postgres` (Debian's package makes that user), or as `nobody`.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
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


class Cluster:
    """A cluster in a folder, which may be killed and started again."""

    def __init__(self, programs: Path, home: Path):
        self._programs, self._home, self._data = programs, home, home / "data"
        self._identity = _identity()
        if self._identity:
            os.chown(home, self._identity["user"], self._identity["group"])
        self._run("initdb", "-D", self._data, "-U", "luthier", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        self.url = f"postgresql+psycopg://luthier@/postgres?host={home}"

    def start(self) -> None:
        """Start it, after it was killed too."""
        settings = f"-c listen_addresses='' -c unix_socket_directories='{self._home}' -c fsync=off -c max_connections=60"
        self._run("pg_ctl", "-D", self._data, "-l", self._home / "log", "-o", settings, "-w", "start")

    def stop(self) -> None:
        """Stop it at once."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """Kill the server and all of its processes as a machine does that is out of memory; return when they are gone."""
        postmaster = int((self._data / "postmaster.pid").read_text().split()[0])
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for process in (postmaster, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        until = time.monotonic() + 20
        while any(_is_running(process) for process in (postmaster, *map(int, children))):
            assert time.monotonic() < until, "PostgreSQL did not die"
            time.sleep(0.01)
        for left in (self._data / "postmaster.pid", self._home / ".s.PGSQL.5432.lock"):
            left.unlink(missing_ok=True)  # it names a process that may be a zombie for as long as nobody asks how it ended

    def _run(self, program: str, *words: object) -> None:
        command = [str(self._programs / program), *map(str, words)]
        done = subprocess.run(
            command, cwd=self._home, stdin=subprocess.DEVNULL, capture_output=True, text=True, **self._identity, check=False
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"


@contextmanager
def running_cluster(programs: Path) -> Iterator[Cluster]:
    """Give a fresh cluster that runs; its files and processes are gone when the block ends."""
    home = Path(tempfile.mkdtemp(prefix="luthier-pg-"))
    try:
        cluster = Cluster(programs, home)
        cluster.start()
        try:
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextmanager
def running_postgres(programs: Path) -> Iterator[str]:
    """Give the URL of a fresh cluster; its files and processes are gone when the block ends."""
    with running_cluster(programs) as cluster:
        yield cluster.url


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


def _is_running(process: int) -> bool:
    """Whether it is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
