"""Does the registry lose anything when many write at once, or when writers are killed?

At once: 8 processes register 200 adapters each under one name; every one must be there, under the numbers 1 to 1,600. Killed:
200 times a process that registers without pause gets SIGKILL at a random moment; no row may point to bytes that are not there,
no version may be half, and after `gc` the doctor must find nothing. On SQLite and on a PostgreSQL of its own (PLACE: on that one
registry). What is claimed is counted here with plain SQL and hashlib, beside the doctor's word. The last line on stdout is one
JSON document. `--each 15 --kills 12` is the run of the tests.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sqlalchemy import text  # noqa: E402
from tests.adapter_folders import save_adapter_folder  # noqa: E402
from tests.postgres import fresh_database, postgres_programs, running_postgres  # noqa: E402

from luthier.registry.doctor import examine_registry  # noqa: E402
from luthier.registry.place import Registry, open_registry  # noqa: E402
from luthier.registry.registering import register  # noqa: E402
from luthier.registry.sweeping import sweep  # noqa: E402
from luthier.registry.verifying import verify_store  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", help="an empty place; default: SQLite and PostgreSQL, both in temporary folders")
    parser.add_argument("--only", nargs="*", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--each", type=int, default=200)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for name, place, scratch in _places(arguments.place, arguments.only):
        open_registry(place, create=True).database.engine.dispose()
        result[name] = {
            "at_once": at_once(place, scratch, arguments.processes, arguments.each),
            "killed": killed(place, scratch, arguments.kills, random.Random(arguments.seed)),
        }
        _print(name, result[name])
    print(json.dumps(result))


def at_once(place: str, scratch: Path, processes: int, each: int) -> dict[str, Any]:
    """Let processes register at the same moment, and count what came of it."""
    start = time.time() + 1.0
    pipes = []
    for index in range(processes):
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            with _exit_afterwards():
                registry = open_registry(place)
                time.sleep(max(0.0, start - time.time()))
                numbers = [_register(registry, scratch, index * each + n, "together") for n in range(each)]
                os.write(write_end, json.dumps(numbers).encode())
        os.close(write_end)
        pipes.append(read_end)
    numbers = []
    for pipe in pipes:
        with os.fdopen(pipe, "rb") as stream:
            numbers += json.loads(stream.read() or b"[]")
    seconds = time.time() - start
    failed = sum(os.waitstatus_to_exitcode(os.wait()[1]) != 0 for _ in pipes)
    registry = open_registry(place)
    found = _numbers(registry, "together")
    registry.database.engine.dispose()
    wanted = list(range(1, processes * each + 1))
    return {
        "asked": processes * each,
        "failed_processes": failed,
        "answered": len(numbers),
        "lost": len(set(numbers) - set(found)) + processes * each - len(numbers),
        "contiguous": sorted(numbers) == wanted and found == wanted,
        "per_second": round(processes * each / seconds, 1),
    }


def killed(place: str, scratch: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill a registering process at random moments, and count what is left."""
    registered, first, usual = 0, 1_000_000, 0.1
    for _ in range(kills):
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            with _exit_afterwards():
                registry = open_registry(place)
                os.write(write_end, b"ready\n")
                for seed in range(first, first + 10_000):
                    start = time.perf_counter()
                    _register(registry, scratch, seed, "killed")
                    os.write(write_end, f"{time.perf_counter() - start}\n".encode())
        os.close(write_end)
        with os.fdopen(read_end, "rb") as stream:
            assert stream.readline() == b"ready\n"
            time.sleep(chance.uniform(0, 3 * usual))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done = [float(line) for line in stream.readlines()]
        registered += len(done)
        # A busy machine takes longer: the moments should fall into the first three registrations, wherever that is.
        usual = 0.8 * usual + 0.2 * sum(done) / len(done) if done else 1.2 * usual
        first += 10_000
    registry = open_registry(place)
    before = examine_registry(registry)
    found = _numbers(registry, "killed")
    dangling, half = _dangling(registry), _half(registry)
    swept = sweep(registry, actor="benchmark", grace=timedelta(0))
    after = examine_registry(registry)
    report = verify_store(registry)
    registry.database.engine.dispose()
    return {
        "kills": kills,
        "answered": registered,
        "versions": len(found),
        "contiguous": found == list(range(1, len(found) + 1)),
        "dangling_rows": dangling,
        "half_versions": half,
        "faults_before_gc": sum(not finding.is_litter for finding in before),
        "litter_before_gc": sum(finding.is_litter for finding in before),
        "swept_blobs": len(swept.blobs),
        "swept_files": len(swept.leftovers),
        "findings_after_gc": len(after),
        "bytes_sound": report.exit_code == 0,
    }


def _register(registry: Registry, scratch: Path, seed: int, name: str) -> int:
    folder = save_adapter_folder(scratch / str(seed), seed)
    done = register(registry, folder, name=name, actor="benchmark", owner="benchmark", no_data_reason="random numbers")
    shutil.rmtree(folder)
    return done.version


def _numbers(registry: Registry, name: str) -> list[int]:
    query = "SELECT version FROM adapter_version JOIN adapter ON adapter.id = adapter_id WHERE name = :name ORDER BY version"
    with registry.database.engine.connect() as connection:
        return [row[0] for row in connection.execute(text(query), {"name": name})]


def _dangling(registry: Registry) -> int:
    """Rows of files whose bytes are not in the store, by sha256 of what lies there."""
    sound = {
        path.name
        for path in Path(registry.blobs.place, "sha256").rglob("*")
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    }
    with registry.database.engine.connect() as connection:
        return sum(row[0] not in sound for row in connection.execute(text("SELECT blob_digest FROM adapter_file")))


def _half(registry: Registry) -> int:
    """Versions that have not exactly their two files, or no event, or no message in the outbox."""
    files = "SELECT count(*) FROM adapter_version v WHERE (SELECT count(*) FROM adapter_file f WHERE f.version_id = v.id) <> 2"
    events = "SELECT count(*) FROM audit_event WHERE action = 'version.register'"
    with registry.database.engine.connect() as connection:
        versions = connection.scalar(text("SELECT count(*) FROM adapter_version")) or 0
        told = connection.scalar(text(events)) or 0
        sent = connection.scalar(text("SELECT count(*) FROM outbox")) or 0
        return int(connection.scalar(text(files)) or 0) + abs(versions - told) + abs(versions - sent)


@contextlib.contextmanager
def _exit_afterwards() -> Iterator[None]:
    """Leave a forked process without running what its parent had planned for its own end."""
    try:
        yield
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _places(given: str | None, only: list[str]) -> Iterator[tuple[str, str, Path]]:
    with tempfile.TemporaryDirectory(prefix="luthier-writers-") as folder:
        scratch = Path(folder)
        if given:
            yield "given", given, scratch
            return
        if "sqlite" in only:
            yield "sqlite", str(scratch / "registry"), scratch
        if "postgresql" in only and (programs := postgres_programs()):
            with running_postgres(programs) as server, fresh_database(server) as url:
                yield "postgresql", f"{url}&blobs={scratch / 'blobs'}", scratch


def _print(name: str, found: dict[str, dict[str, Any]]) -> None:
    for part, figures in found.items():
        print(f"{name}, {part.replace('_', ' ')}")
        for key, value in figures.items():
            print(f"  {key.replace('_', ' '):20}{value}")


if __name__ == "__main__":
    main()
