"""What does a question of governance cost in a large registry, and does it grow with the registry or with its answer?

Fills a registry (10,000 versions of 500 adapters, 1,000 data sets, 200,000 rows of the index of people) and one of a tenth, on
SQLite and on PostgreSQL (--postgres URL of an empty database; without it only SQLite), and asks each question of several data
sets, people and versions: the median time, the size of the answer, and the scans of whole tables in SQLite's query plans. The
answers grow or not as the graph does: chains of continued versions and of filtered data are as long in both. The last line on
stdout is one JSON document. `--versions 200 --repeats 2` is the tiny run of the test suite.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import event, insert, text
from sqlalchemy.orm import Session

from luthier.registry import lineage
from luthier.registry.columns import Audience, now
from luthier.registry.database import Database
from luthier.registry.place import Registry, open_registry
from luthier.registry.production import in_production
from luthier.registry.schema import (
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
    """Ask every question and return median milliseconds, rows of the answer, and scans of whole tables."""
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
        scans = whole_scans(registry.database, calls[0]) if registry.database.is_sqlite else None
        middle = {"ms": statistics.median(times), "cpu_ms": statistics.median(cpu), "rows": statistics.mean(sizes)}
        found[name] = middle | {"worst_ms": max(times), "scans": scans}
    return found


def whole_scans(database: Database, call: Callable[[Session], int]) -> list[str]:
    """Return the steps of SQLite's plans for a question that read a whole table."""
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.reading() as session:
        call(session)
    event.remove(database.engine, "before_cursor_execute", note)
    tables = {table.name for table in Adapter.metadata.sorted_tables}
    with database.engine.connect() as connection:
        plans = [row[3] for one in asked for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {one[0]}", one[1])]
    return [step for step in plans if step.startswith("SCAN") and step.split()[1] in tables]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--postgres", help="URL of a server's database; tables are made in it and dropped again")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    console = Console(stderr=True, width=150)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("sqlite", "postgresql") if arguments.postgres else ("sqlite",):
            for versions in (arguments.versions // 10, arguments.versions):
                url = str(arguments.postgres)
                shared = f"{url}{'&' if '?' in url else '?'}blobs={folder}/blobs"
                place = str(Path(folder) / f"{versions}") if kind == "sqlite" else shared
                registry = open_registry(place, create=True)
                try:
                    fill(registry.database, versions)
                    result.setdefault(kind, {})[str(versions)] = measure(registry, versions, arguments.repeats)
                finally:
                    if kind == "postgresql":
                        _drop_all(registry.database)
                    registry.database.engine.dispose()
    for kind, by_size in result.items():
        table = Table(kind, *(f"{size}: {what}" for size in by_size for what in ("rows", "ms", "cpu ms", "worst")), "whole scans")
        for name, one in list(by_size.values())[-1].items():
            cells = [
                f"{size[name]['rows']:.0f}" if what == "rows" else f"{size[name][what]:.1f}"
                for size in by_size.values()
                for what in ("rows", "ms", "cpu_ms", "worst_ms")
            ]
            table.add_row(name, *cells, ", ".join(one["scans"] or []))
        console.print(table)
    print(json.dumps(result))


def _drop_all(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")


if __name__ == "__main__":
    main()
