"""A promotion, a rollback and a hold reach a server that is answering: a real engine, a real port, clients that never stop."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.registry_rows import judge, key_for, surface_for, tenant_for
from tests.serve_scene import serving
from tests.served_adapters import save_random_adapter

from luthier.engine import Engine
from luthier.registry.columns import Audience
from luthier.registry.place import Registry, open_registry
from luthier.registry.promotion import promote, rollback
from luthier.registry.registering import register
from luthier.registry.surfaces import hold
from luthier.registry.versions import find_version
from luthier.serve.app import make_app
from luthier.serve.backend import EngineBackend
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.watched import watched_gateway

CLIENTS = 4


@pytest.fixture
def registry(tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any) -> Iterator[Registry]:
    """Two versions of an adapter for the tiny base, the first of which serves the surface `shop`."""
    opened = open_registry(tmp_path / "registry", create=True)
    surface_for(opened, Audience.INTERNAL)
    for seed in range(2):
        folder = save_random_adapter(tmp_path / f"a{seed}", base(tiny_llama, tiny_tokenizer), seed)
        register(opened, folder, name="orders", actor="ann", owner="team", no_data_reason="a test")
        judge(opened, f"orders:{seed + 1}")
    promote(opened, "orders:1", "shop", actor="dan")
    tenant_for(opened, "acme", ("surface", "shop"))
    yield opened
    opened.database.engine.dispose()


def base(tiny_llama: Any, tiny_tokenizer: Any) -> Any:
    model = tiny_llama(vocab=len(tiny_tokenizer), seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # clear winners among its logits, whatever else is in the batch
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    model.config.architectures = [type(model).__name__]
    return model


class Clients:
    """Threads that ask for streams, one after the other, and note what answered each, and each failure."""

    def __init__(self, url: str, key: str):
        self.answered: list[tuple[float, str, tuple[str, ...]]] = []
        self.failures: list[str] = []
        self._url, self._key = url, key
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(CLIENTS)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask_on(self) -> None:
        ask = {"model": "shop", "messages": [{"role": "user", "content": "hm"}]}
        body = ask | {"max_tokens": 8, "temperature": 0, "stream": True}
        with httpx.Client(base_url=self._url, headers={"Authorization": f"Bearer {self._key}"}, timeout=60) as client:
            while not self._stop.is_set():
                texts: list[str] = []
                with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    begun = time.monotonic()
                    texts += [line for line in answer.iter_lines() if line.startswith("data: {")]
                problem = answer.status_code != 200 or any("error" in json.loads(line[6:]) for line in texts)
                if problem:
                    self.failures.append(f"{answer.status_code} {texts[-1:]}")
                    time.sleep(0.05)
                else:
                    said = tuple(json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in texts)
                    self.answered.append((begun, answer.headers["x-luthier-version"], said))

    def wait(self, condition: Callable[[], bool]) -> float:
        """Wait for what the clients come to see, and return how long it took."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < 30, Counter(version for _, version, _ in self.answered)
            time.sleep(0.01)
        return time.monotonic() - begun

    def all_from(self, version: str) -> Callable[[], bool]:
        """Return whether the last answers of all came from that version."""
        return lambda: len(self.answered) > 2 * CLIENTS and {name for _, name, _ in self.answered[-2 * CLIENTS :]} == {version}


def test_clients_see_new_versions_soon_and_no_failure(
    registry: Registry, tmp_path: Path, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    engine = Engine(base(tiny_llama, tiny_tokenizer), tiny_tokenizer, registry=registry)
    settings = ServeSettings(served_name="tiny", state=tmp_path / "state", refresh_seconds=0.2)
    gateway: Gateway = watched_gateway(settings, EngineBackend(engine), tiny_tokenizer, registry)
    key = key_for(registry)
    with serving(make_app(gateway)) as url, Clients(url, key) as clients:
        clients.wait(clients.all_from("orders:1"))
        for _ in range(2):
            promote(registry, "orders:2", "shop", actor="dan")
            clients.wait(clients.all_from("orders:2"))
            rollback(registry, "shop", actor="dan")
            clients.wait(clients.all_from("orders:1"))
        assert clients.failures == []
        said = {
            version: {"".join(texts) for _, name, texts in clients.answered if name == version}
            for version in ("orders:1", "orders:2")
        }
        assert all(len(texts) == 1 for texts in said.values()), said
        assert said["orders:1"] != said["orders:2"]

        with registry.database.writing() as session:
            hold(session, find_version(session, "orders:1"), "it insults people", actor="dan")
        clients.wait(lambda: len(clients.failures) >= 2 * CLIENTS)
        held_at, seen = time.monotonic(), len(clients.failures)
        clients.wait(lambda: len(clients.failures) >= seen + CLIENTS)
        assert not [begun for begun, _, _ in clients.answered if begun > held_at]
        assert set(clients.failures[-CLIENTS:]) == {"503 []"}  # nothing serves the surface: the bare base is no answer
