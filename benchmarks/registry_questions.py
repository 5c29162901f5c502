"""What does a question of governance cost in a large registry, and does it grow with the registry or with its answer?

Fills a registry (10,000 versions of 500 adapters, 1,000 data sets, 200,000 rows of the index of people) and one of a tenth, on
SQLite and on a PostgreSQL of its own where one is installed, and asks each question of several data sets, people and versions:
the median time, the size of the answer, the scans of whole tables in the plans, and the pages that PostgreSQL looked at, which do
not depend on what else the machine does. The answers grow or not as the graph does: chains of continued versions and of filtered
data are as long in both. The last line on stdout is one JSON document. `--versions 200 --repeats 2` is the run of the tests.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from sqlalchemy import event, insert, text  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402
from tests.postgres import fresh_database, postgres_programs, running_postgres  # noqa: E402

from luthier.registry import lineage  # noqa: E402
from luthier.registry.columns import Audience, now  # noqa: E402
from luthier.registry.database import Database  # noqa: E402
from luthier.registry.place import Registry, open_registry  # noqa: E402
from luthier.registry.production import in_production  # noqa: E402
from luthier.registry.schema import (  # noqa: E402
    Adapter,
    AdapterDataset,
    AdapterParent,
    AdapterVersion,
    Dataset,
    DatasetParent,
    DatasetSubject,
    DatasetVersion,
    Deployment,
    Surface,
)

LINE = 5
"""Versions that continue each other in a row, and data sets made of each other."""


def person(number: int) -> bytes:
    return number.to_bytes(4, "big") * 8


def fill(database: Database, versions: int) -> None:
    """Fill a registry in which every answer is of much the same size, however many versions there are."""
    draw = random.Random(0)
    data, adapters, people = max(versions // 10, LINE), max(versions // 20, 1), versions * 20
    plain: dict[str, Any] = {"recipe": {"r": 8}, "metrics": {"loss": 1.0}, "environment": {}, "target_modules": ["q_proj"]}
    sizes = {
        "rank": 8,
        "alpha": 16.0,
        "num_parameters": 1,
        "size_bytes": 1,
        "peft_type": "LORA",
        "lineage_digest": "l",
        "created_by": "o",
    }
    audiences = list(Audience)
    surfaces = [{"id": i, "name": f"s{i}", "audience": audiences[i % 3], "owner": "o", "rules": {}} for i in range(1, 31)]
    rows: dict[Any, list[dict[str, Any]]] = {
        Adapter: [{"id": i, "name": f"adapter-{i:05d}", "owner": "o", "created_by": "o"} for i in range(1, adapters + 1)],
        AdapterVersion: [
            {"id": i, "adapter_id": i % adapters + 1, "version": i, "manifest_digest": f"{i:064d}"} | plain | sizes
            for i in range(1, versions + 1)
        ],
        AdapterParent: [
            {"parent_id": i, "child_id": i + 1, "relation": "continued"} for i in range(1, versions) if i % LINE
        ],
        Dataset: [{"id": i, "name": f"data-{i:05d}", "owner": "o"} for i in range(1, data + 1)],
        DatasetVersion: [{"id": i, "dataset_id": i, "version": 1, "digest": f"{i:064x}"} for i in range(1, data + 1)],
        DatasetParent: [{"parent_id": i, "child_id": i + 1, "transform": "filtered"} for i in range(1, data) if i % LINE],
        AdapterDataset: [{"version_id": i, "dataset_version_id": draw.randint(1, data)} for i in range(1, versions + 1)],
        # Only every fifth has an index of people, the first of its line: the others are taken to hold whoever it holds.
        DatasetSubject: [
            {"dataset_version_id": i * LINE % data // LINE * LINE + 1, "subject_hmac": person(i)} for i in range(people)
        ],
        Surface: surfaces,
        Deployment: [
            {"version_id": i, "surface_id": i % 30 + 1, "started_by": "o", "ended_at": None if i % 10 == 1 else now()}
            for i in range(1, versions + 1, 2)
        ],
    }  # fmt: skip
    with database.writing() as session:
        for table, values in rows.items():
            for start in range(0, len(values), 5000):
                session.execute(insert(table), values[start : start + 5000])
    if not database.is_sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))


def questions(versions: int, repeats: int) -> dict[str, list[Callable[[Session], int]]]:
    """Question -> so many calls of it, each about something else; a call returns the size of its answer."""
    draw = random.Random(1)
    data, people = max(versions // 10, LINE), versions * 20
    asked = [(draw.randint(1, data), person(draw.randrange(people)), draw.randint(1, versions)) for _ in range(repeats)]

    def each(ask: Callable[[Session, int, bytes, int], Any]) -> list[Callable[[Session], int]]:
        return [lambda session, one=one: len(ask(session, *one)) for one in asked]

    return {
        "in production for customers": each(lambda session, *_: in_production(session, audience=Audience.CUSTOMER)),
        "trained on a data set": each(lambda session, d, p, v: lineage.trained_on(session, [d])),
        "trained on a person's rows": each(lambda session, d, p, v: lineage.trained_on_person(session, p)),
        "data made of a data set": each(lambda session, d, p, v: lineage.made_of_data(session, [d])),
        "data that holds a person": each(lambda session, d, p, v: lineage.holding_person(session, p)),
        "ancestors of a version": each(lambda session, d, p, v: lineage.ancestors(session, v)),
        "descendants of a version": each(lambda session, d, p, v: lineage.descendants(session, [v])),
        "data a version has seen": each(lambda session, d, p, v: lineage.data_seen(session, v)),
    }


def measure(registry: Registry, versions: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Ask every question and return median milliseconds, rows of the answer, and what the plans read."""
    found: dict[str, dict[str, Any]] = {}
    for name, calls in questions(versions, repeats).items():
        with registry.database.reading() as session:
            calls[0](session)  # what SQLAlchemy compiles once
            times, cpu, sizes = [], [], []
            for call in calls:
                began, cpu_began = time.perf_counter(), time.process_time()
                sizes.append(call(session))
                times.append((time.perf_counter() - began) * 1000)
                cpu.append((time.process_time() - cpu_began) * 1000)
        middle = {"ms": statistics.median(times), "cpu_ms": statistics.median(cpu), "rows": statistics.mean(sizes)}
        plans = [explained(registry.database, call) for call in calls]
        scans = sorted({table for tables, _ in plans for table in tables})
        pages = None if registry.database.is_sqlite else statistics.mean(pages for _, pages in plans)
        found[name] = middle | {"worst_ms": max(times), "scans": scans, "pages": pages}
    return found


def explained(database: Database, call: Callable[[Session], int]) -> tuple[set[str], int]:
    """Return the tables that a question reads whole, and the pages that it looks at (PostgreSQL; 8 KiB each)."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.reading() as session:
        call(session)
    event.remove(database.engine, "before_cursor_execute", note)
    known, tables, pages = {table.name for table in Adapter.metadata.sorted_tables}, set(), 0
    with database.engine.connect() as connection:
        for statement, parameters in asked:
            if database.is_sqlite:
                steps = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                tables |= {step[3].split()[1] for step in steps if step[3].startswith("SCAN")}
            else:  # ANALYZE runs it: what a question sets for its own plans is set here too
                explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}"
                plan = connection.exec_driver_sql(explain, parameters).scalar_one()[0]["Plan"]
                pages += plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
                tables |= {step["Relation Name"] for step in _steps(plan) if step["Node Type"] == "Seq Scan"}
    return tables & known, pages


def _steps(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", []):
        yield from _steps(inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--postgres", help="another server, postgresql+psycopg://USER@/postgres?host=HOST; databases come and go")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        server = arguments.postgres
        if server is None and "postgresql" in arguments.only and (programs := postgres_programs()):
            server = stack.enter_context(running_postgres(programs))
        for kind in arguments.only if server else [kind for kind in arguments.only if kind == "sqlite"]:
            for versions in (arguments.versions // 10, arguments.versions):
                with empty_place(kind, Path(folder, str(versions)), server) as place:
                    registry = open_registry(place, create=True)
                    fill(registry.database, versions)
                    result.setdefault(kind, {})[str(versions)] = measure(registry, versions, arguments.repeats)
                    registry.database.engine.dispose()
    console = Console(stderr=True, width=200)
    for kind, by_size in result.items():
        console.print(table_of(kind, by_size))
    print(json.dumps(result))


@contextmanager
def empty_place(kind: str, folder: Path, server: str | None) -> Iterator[str]:
    """Give an empty place for a registry: the folder, or a database that is gone afterwards."""
    if kind == "sqlite" or server is None:
        yield str(folder)
    else:
        with fresh_database(server) as url:
            yield f"{url}&blobs={folder}-blobs"


def table_of(kind: str, by_size: dict[str, dict[str, dict[str, Any]]]) -> Table:
    """Return the table for people: a question a line, the small registry beside the large one."""
    columns = {"rows": ".0f", "ms": ".1f", "cpu_ms": ".1f", "worst_ms": ".1f"} | ({"pages": ".0f"} if kind != "sqlite" else {})
    table = Table(kind, *(f"{size}: {what}" for size in by_size for what in columns), "whole scans")
    for name, one in list(by_size.values())[-1].items():
        cells = [format(size[name][what], form) for size in by_size.values() for what, form in columns.items()]
        table.add_row(name, *cells, ", ".join(one["scans"]))
    return table


if __name__ == "__main__":
    main()
