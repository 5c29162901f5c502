"""The ledger: what a client was answered is in the books once, whoever was killed meanwhile."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError
from tests.gateway_scene import KEY, ScriptedBackend, until, view
from tests.postgres import Cluster, postgres_programs, running_cluster
from tests.registry_rows import key_for, tenant_for

from luthier.engine.requests import Sampling
from luthier.registry.place import Registry, open_registry
from luthier.registry.schema_serving import UsageEvent, UsageTotal
from luthier.registry.view import Caller
from luthier.serve.books import RegistryBooks
from luthier.serve.errors import ApiError
from luthier.serve.gateway import Gateway
from luthier.serve.ledger import Answered, Ledger
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews
from luthier.serve.watched import watched_gateway

ROOT = Path(__file__).resolve().parents[3]
NOON = datetime(2026, 11, 30, 12, tzinfo=UTC)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """A registry with a tenant that may call the base, and a key of its."""
    opened = open_registry(tmp_path / "registry", create=True)
    tenant_for(opened, "acme", ("base", ""))
    key_for(opened, "acme")
    yield opened
    opened.database.engine.dispose()


def answered(number: int, tenant_id: int = 1, at: datetime = NOON, **more: Any) -> Answered:
    values: dict[str, Any] = {
        "key_id": 1, "version_id": None, "model": "base", "surface_id": None, "experiment_id": None, "epoch": None,
        "unit_digest": None, "prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": number, "status": "stop",
    }  # fmt: skip
    return Answered(request_id=f"r{number}", tenant_id=tenant_id, finished_at=at, **(values | more))


def in_the_books(registry: Registry) -> dict[str, int]:
    """Return the tokens of every event, after a look at whether the day's sums are theirs."""
    with registry.database.reading() as session:
        events = {row.request_id: row.prompt_tokens + row.completion_tokens for row in session.scalars(select(UsageEvent))}
        tokens = func.sum(UsageTotal.prompt_tokens + UsageTotal.completion_tokens)
        assert (session.scalar(tokens) or 0) == sum(events.values())
        assert (session.scalar(func.sum(UsageTotal.requests)) or 0) == len(events)
        return events


async def send_all(folder: Path, registry: Registry) -> Ledger:
    ledger = Ledger(folder, RegistryBooks(registry.database, "g"), send_seconds=0.01)
    await ledger.start()
    await until(lambda: not ledger.journal.sealed() and ledger.journal.bytes == 0)
    await ledger.close()
    return ledger


class LosesAnswers(RegistryBooks):
    """Books behind a line that is cut after what was said has arrived, every other time."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.num_calls = 0

    def add(self, answers: Sequence[Answered]) -> None:
        """Add, and perhaps never say so."""
        super().add(answers)
        self.num_calls += 1
        if self.num_calls % 2:
            raise OperationalError("COMMIT", {}, Exception("server closed the connection unexpectedly"))


class Away:
    """Books that are out of reach until `real` is given."""

    def __init__(self) -> None:
        self.real: RegistryBooks | None = None

    def add(self, answers: Sequence[Answered]) -> None:
        """Add, if there is anything to add to."""
        if self.real is None:
            raise OperationalError("INSERT", {}, Exception("connection refused"))
        self.real.add(answers)

    def tokens_of(self, day: date) -> Any:
        """Return the day's tokens."""
        if self.real is None:
            raise OperationalError("SELECT", {}, Exception("connection refused"))
        return self.real.tokens_of(day)


def test_a_line_holds_all_of_an_answer() -> None:
    answer = answered(3, unit_digest="ab" * 32, experiment_id=1, epoch=2, at=datetime(2026, 1, 1, tzinfo=UTC))
    assert Answered.from_line(json.loads(json.dumps(answer.as_line()))) == answer


def test_a_batch_whose_answer_was_lost_counts_once(registry: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        books = LosesAnswers(registry.database, "g")
        ledger = Ledger(tmp_path / "usage", books, send_seconds=0.01)
        await ledger.start()
        for number in range(1200):
            ledger.record(answered(number))
        await until(lambda: ledger.journal.bytes == 0)
        await ledger.close()
        assert books.num_calls >= 4

    asyncio.run(scenario())
    assert in_the_books(registry) == {f"r{number}": 10 + number for number in range(1200)}


def test_while_the_registry_is_away_usage_is_kept_and_sent_later(registry: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        books = Away()
        ledger = Ledger(tmp_path / "usage", books, send_seconds=0.01)
        await ledger.start()
        for number in range(30):
            ledger.record(answered(number))
            await asyncio.sleep(0.002)
        await until(lambda: ledger.away_because is not None)
        assert in_the_books(registry) == {} and ledger.fault() is None
        assert len(list((tmp_path / "usage").glob("*.jsonl"))) <= 2  # it does not begin a file with every try
        books.real = RegistryBooks(registry.database, "g")
        await until(lambda: ledger.away_because is None and ledger.journal.bytes == 0)
        await ledger.close()

    asyncio.run(scenario())
    assert len(in_the_books(registry)) == 30


def test_what_is_left_when_the_server_ends_is_sent_by_the_next_one(registry: Registry, tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = Ledger(tmp_path / "usage", Away(), send_seconds=0.01)
        await ledger.start()
        ledger.record(answered(1))
        await ledger.close()
        await send_all(tmp_path / "usage", registry)

    asyncio.run(scenario())
    assert in_the_books(registry) == {"r1": 11}


def test_what_the_registry_refuses_for_good_holds_up_nobody_else(registry: Registry, tmp_path: Path) -> None:
    """Not on SQLite alone: a tenant that does not exist breaks a foreign key in either database."""

    async def scenario() -> None:
        ledger = Ledger(tmp_path / "usage", RegistryBooks(registry.database, "g"), send_seconds=0.01)
        await ledger.start()
        for number in range(20):
            ledger.record(answered(number, tenant_id=999 if number == 7 else 1))
        await until(lambda: ledger.journal.bytes == 0)
        await ledger.close()

    asyncio.run(scenario())
    assert sorted(in_the_books(registry)) == sorted(f"r{number}" for number in range(20) if number != 7)
    [refused] = (tmp_path / "usage" / "refused.jsonl").read_text().splitlines()
    assert json.loads(refused)["request_id"] == "r7"


def test_limits_know_the_day_of_all_gateways(registry: Registry, tmp_path: Path) -> None:
    """Whenever it is asked, the registry's sum and what is not there yet are all that was used, neither more nor less."""

    async def scenario() -> None:
        RegistryBooks(registry.database, "another").add([answered(100, at=NOON)])
        sums: list[int] = []

        def synced(day: date, recorded: Any, unsent: Any) -> None:
            assert day == NOON.date()
            sums.append(recorded.get(1, 0) + unsent.get(1, 0))

        ledger = Ledger(
            tmp_path / "usage", RegistryBooks(registry.database, "g"), send_seconds=0.01, now=lambda: NOON, synced=synced
        )
        await ledger.start()
        await until(lambda: sums == [110])
        total = 110
        for number in range(50):
            ledger.record(answered(number))
            ledger.record(answered(1000 + number, at=NOON - timedelta(days=1)))  # yesterday's count for yesterday
            total += 10 + number
            await asyncio.sleep(0.001)
        await until(lambda: ledger.journal.bytes == 0 and sums[-1] == total)
        assert sums == sorted(sums)
        await ledger.close()

    asyncio.run(scenario())


def test_a_journal_that_is_full_stops_new_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = Ledger(tmp_path / "usage", Away(), send_seconds=0.01, max_bytes=1000)
        await ledger.start()
        for number in range(5):
            ledger.record(answered(number))
        assert "full" in str(ledger.fault())
        gateway = Gateway(ServeSettings(served_name="base"), ScriptedBackend(), None, FixedViews(view(1)), ledger=ledger)
        await gateway.views.start(gateway.residency.take)
        with pytest.raises(ApiError) as caught:
            await _answer(gateway, gateway.caller(f"Bearer {KEY}"), "one")
        assert caught.value.status == 503
        await ledger.close()

    asyncio.run(scenario())


def test_a_server_that_is_killed_loses_nothing_that_it_told(registry: Registry, tmp_path: Path) -> None:
    dice, told = random.Random(4), dict[str, int]()
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    program, place = str(ROOT / "tests/ledger_writer.py"), str(Path(registry.place).parent)
    for life in range(4):
        command = [sys.executable, program, place, str(tmp_path / "usage"), str(life)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            assert first, "it wrote nothing"
            time.sleep(0.2 + dice.random())
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read()
        for line in (first + rest).splitlines(keepends=True):
            if line.endswith(b"\n"):
                request_id, tokens = line.split()
                told[request_id.decode()] = int(tokens)
    assert any((tmp_path / "usage").glob("[0-9]*.jsonl")), "nothing was left to be sent, so this shows little"
    before = in_the_books(registry)
    assert before, "nothing was sent before it was killed, so this shows little"
    asyncio.run(send_all(tmp_path / "usage", registry))
    books = in_the_books(registry)
    assert told.items() <= books.items()
    # The last line of a life may have been written and not told: killed in between.
    assert len(books) - len(told) <= 4


def test_a_gateway_is_killed_under_load_and_what_clients_got_is_billed_once(registry: Registry, tmp_path: Path) -> None:
    """Over HTTP: every answer that a client has read to its end is in the books once, whichever life of the server gave it."""
    key, place = key_for(registry, "acme", "client"), str(Path(registry.place).parent)
    command = [sys.executable, str(ROOT / "tests/killed_server.py"), place, str(tmp_path / "state")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    got: dict[str, int] = {}

    def ask_on(url: str, stop: threading.Event) -> None:
        body = {"model": "base", "prompt": [1, 2, 3], "max_tokens": 4}
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30) as client:
            while not stop.is_set():
                try:
                    answer = client.post("/v1/completions", json=body)
                except httpx.TransportError:
                    return  # it was killed
                assert answer.status_code == 200, answer.text
                got[answer.json()["id"]] = answer.json()["usage"]["total_tokens"]

    for life in range(3):
        stop = threading.Event()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as server:
            assert server.stdout is not None
            url = f"http://127.0.0.1:{int(server.stdout.readline())}"
            clients = [threading.Thread(target=ask_on, args=(url, stop)) for _ in range(4)]
            for client in clients:
                client.start()
            before, until_moment = len(got), time.monotonic() + 60
            while len(got) < before + 40:
                assert time.monotonic() < until_moment, "nobody was answered"
                time.sleep(0.01)
            time.sleep(0.3 * life)
            server.send_signal(signal.SIGKILL)
            for client in clients:
                client.join(60)
            stop.set()
    asyncio.run(send_all(tmp_path / "state" / "usage", registry))
    books = in_the_books(registry)
    assert got.items() <= books.items()
    assert len(books) - len(got) <= 3 * 4  # written down, and the client did not get it any more


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the driver of the extra 'postgres' is not installed")
    with running_cluster(programs) as running:
        yield running


def test_postgresql_is_killed_under_load_and_everything_counts_once(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))

    async def load(gateway: Gateway, caller: Caller, told: dict[str, int], stop: asyncio.Event, client: int) -> None:
        number = 0
        while not stop.is_set():
            request_id = f"c{client}-{number}"
            tokens = await _answer(gateway, caller, request_id, 1 + number % 5)
            told[request_id] = tokens
            number += 1
            await asyncio.sleep(0.01)

    async def scenario(registry: Registry, key: str) -> dict[str, int]:
        settings = ServeSettings(served_name="base", state=tmp_path / "state", refresh_seconds=0.05)
        gateway = watched_gateway(settings, ScriptedBackend(), None, registry)
        await gateway.start()
        caller, told, stop = gateway.caller(f"Bearer {key}"), dict[str, int](), asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for client in range(8):
                group.create_task(load(gateway, caller, told, stop, client))
            for _ in range(2):
                sent = _ledger(gateway).sent
                await until(lambda: _ledger(gateway).sent > sent)  # noqa: B023
                await asyncio.to_thread(cluster.kill)
                await until(lambda: _ledger(gateway).away_because is not None)
                assert gateway.views.fault() is None  # what was known still counts
                gateway.caller(f"Bearer {key}")
                during = len(told)
                await until(lambda: len(told) > during + 50)  # noqa: B023
                await asyncio.to_thread(cluster.start)
                await until(lambda: _ledger(gateway).away_because is None)
            stop.set()
        await until(lambda: _ledger(gateway).journal.sealed() == [] and _ledger(gateway).sent >= len(told))
        await gateway.close()
        return told

    registry = open_registry(f"{cluster.url}&blobs={tmp_path / 'blobs'}", create=True)
    tenant_for(registry, "acme", ("base", ""))
    told = asyncio.run(scenario(registry, key_for(registry, "acme")))
    assert in_the_books(registry) == told
    registry.database.engine.dispose()


def _ledger(gateway: Gateway) -> Ledger:
    assert gateway.ledger is not None
    return gateway.ledger


async def _answer(gateway: Gateway, caller: Caller, request_id: str, tokens: int = 1) -> int:
    """Have one answer made, and return the tokens that it took."""
    route = gateway.route(caller, "base")
    completion = None
    async for event in gateway.stream(caller, route, (1, 2, 3), Sampling(max_new_tokens=tokens), request_id=request_id):
        completion = event.completion
    assert completion is not None
    return completion.prompt_tokens + len(completion.token_ids)
