"""What does a gateway pay to know who may call what, and to tell what was used?

Fills a registry (10,000 versions of 500 adapters for 200 tenants, each with two keys, adapters of its own, two that were granted,
a surface and the base) on SQLite and on a PostgreSQL of its own where one is installed. Then: asking whether anything changed,
which gateways do every second; reading the whole view, which they do when something did; the same where every tenant was granted
every adapter; and telling a batch of 500 answers, for the first time and once more. Medians. The last line on stdout is one JSON
document. `--versions 100 --tenants 4 --repeats 2` is the run of the tests.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.registry_questions import empty_place  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sqlalchemy import insert, text  # noqa: E402
from tests.postgres import postgres_programs, running_postgres  # noqa: E402

from luthier.registry.audit import record  # noqa: E402
from luthier.registry.columns import Audience  # noqa: E402
from luthier.registry.database import Database  # noqa: E402
from luthier.registry.place import Registry, open_registry  # noqa: E402
from luthier.registry.schema import Adapter, AdapterVersion, Alias, Deployment, Surface  # noqa: E402
from luthier.registry.schema_serving import ApiKey, Grant, Tenant  # noqa: E402
from luthier.registry.tenancy import GrantKind, digest_of_key  # noqa: E402
from luthier.registry.usage import Usage, record_usage  # noqa: E402
from luthier.registry.view import ServingView, read_view, revision_of  # noqa: E402

BATCH = 500
PER_ADAPTER = 20
NUM_SURFACES = 30


def fill(database: Database, versions: int, tenants: int) -> None:
    adapters = max(versions // PER_ADAPTER, 1)
    plain: dict[str, Any] = {"recipe": {}, "metrics": {}, "environment": {}, "target_modules": ["q_proj"], "peft_type": "LORA"}
    plain |= {"rank": 8, "alpha": 16.0, "num_parameters": 1, "size_bytes": 1, "lineage_digest": "l", "created_by": "o"}
    rows: dict[Any, list[dict[str, Any]]] = {
        Tenant: [{"id": i, "name": f"tenant-{i}", "quotas": {"concurrent": 8}, "created_by": "o"} for i in range(1, tenants + 1)],
        ApiKey: [
            {
                "tenant_id": i,
                "name": name,
                "shown": "lk_",
                "digest": digest_of_key(f"{name} {i}"),
                "scopes": ["inference"],
                "created_by": "o",
            }
            for i in range(1, tenants + 1)
            for name in ("app", "ci")
        ],
        Adapter: [
            {"id": i, "name": f"adapter-{i:05d}", "owner": "o", "tenant": f"tenant-{i % tenants + 1}", "created_by": "o"}
            for i in range(1, adapters + 1)
        ],
        AdapterVersion: [
            {"id": i, "adapter_id": i % adapters + 1, "version": i, "manifest_digest": f"{i:064d}"} | plain
            for i in range(1, versions + 1)
        ],
        Surface: [
            {"id": i, "name": f"s{i}", "audience": Audience.BATCH, "owner": "o", "rules": {}} for i in range(1, NUM_SURFACES + 1)
        ],
        Deployment: [{"version_id": i, "surface_id": i, "started_by": "o"} for i in range(1, NUM_SURFACES + 1)],
        Alias: [{"adapter_id": i % adapters + 1, "name": f"s{i}", "version_id": i} for i in range(1, NUM_SURFACES + 1)],
        Grant: [
            {"tenant_id": i, "kind": kind, "target": target, "created_by": "o"}
            for i in range(1, tenants + 1)
            for kind, target in {
                (GrantKind.ADAPTER.value, f"adapter-{i % adapters + 1:05d}"),
                (GrantKind.ADAPTER.value, f"adapter-{i * 7 % adapters + 1:05d}"),
                (GrantKind.SURFACE.value, f"s{i % NUM_SURFACES + 1}"),
                (GrantKind.BASE.value, ""),
            }
        ],
    }
    with database.writing() as session:
        for table, values in rows.items():
            for start in range(0, len(values), 5000):
                session.execute(insert(table), values[start : start + 5000])
        record(session, "o", "tenant.add", "tenant/all")
    if not database.is_sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))


def grant_all(database: Database, tenants: int) -> None:
    """Let every tenant call every adapter."""
    with database.writing() as session:
        session.execute(text("DELETE FROM tenant_grant"))
        session.execute(
            text(
                "INSERT INTO tenant_grant (tenant_id, kind, target, created_at, created_by) "
                "SELECT t.id, 'adapter', a.name, a.created_at, 'o' FROM tenant t CROSS JOIN adapter a"
            )
        )


def timed(what: Callable[[int], Any], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of so many calls, by the clock and of this process's processor time."""
    what(-1)  # what is done once only
    times, cpu = [], []
    for number in range(repeats):
        began, cpu_began = time.perf_counter(), time.process_time()
        what(number)
        times.append((time.perf_counter() - began) * 1000)
        cpu.append((time.process_time() - cpu_began) * 1000)
    return {"ms": statistics.median(times), "cpu_ms": statistics.median(cpu)}


def measure(registry: Registry, tenants: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return milliseconds by what was done, and the number of names in the two views."""
    database, moment = registry.database, datetime(2026, 11, 30, 12, tzinfo=UTC)

    def view(_: int = 0) -> ServingView:
        with database.reading() as session:
            return read_view(session, base_name="base")

    def revision(_: int) -> int:
        with database.reading() as session:
            return revision_of(session)

    def batch(number: int) -> int:
        answers = (
            Usage(f"{number} {i}", i % tenants + 1, 1, "m", 100, 20, "stop", "g", moment + timedelta(seconds=i), version_id=1)
            for i in range(BATCH)
        )
        return record_usage(database, answers)

    def with_names(told: dict[str, float]) -> dict[str, float]:
        return told | {"names": sum(map(len, view().names.values()))}

    found = {"revision": timed(revision, repeats), "view": with_names(timed(view, repeats))}
    found |= {"batch": timed(batch, repeats), "the same batch": timed(batch, repeats)}
    grant_all(database, tenants)
    return found | {"view, all for all": with_names(timed(view, max(repeats // 5, 1)))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        programs = postgres_programs()
        server = stack.enter_context(running_postgres(programs)) if programs else None
        for kind in ("sqlite", "postgresql") if server else ("sqlite",):
            with empty_place(kind, Path(folder, kind), server) as place:
                registry = open_registry(place, create=True)
                fill(registry.database, arguments.versions, arguments.tenants)
                result[kind] = measure(registry, arguments.tenants, arguments.repeats)
                registry.database.engine.dispose()
    table = Table("", *(f"{kind}: {what}" for kind in result for what in ("ms", "of this process", "names")))
    for name in result["sqlite"]:
        cells = [(f"{one[name]['ms']:,.1f}", f"{one[name]['cpu_ms']:,.1f}", one[name].get("names")) for one in result.values()]
        table.add_row(name, *(f"{cell:,}" if isinstance(cell, int) else cell for row in cells for cell in row))
    Console(stderr=True, width=120).print(table)
    print(json.dumps({"versions": arguments.versions, "tenants": arguments.tenants, "batch": BATCH} | result))


if __name__ == "__main__":
    main()
