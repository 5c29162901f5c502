"""A gateway as its users see it: the app under a real uvicorn, on a free port of this machine, asked over HTTP."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from tests.engine_scene import save_peft_adapter

from luthier.engine import Engine
from luthier.engine.scheduler import Limits
from luthier.serve.app import make_app
from luthier.serve.backend import EngineBackend
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews, Views, local_view

BASE = "tiny"
"""The base's name in requests."""

KEY = "lk_a-key-that-only-tests-know"


@contextmanager
def serving(app: Any) -> Iterator[str]:
    """Run an app under uvicorn in a thread, on a free port of 127.0.0.1; give its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, name="uvicorn", daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until, "the server did not start"
            time.sleep(0.01)
        (listening,) = server.servers
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


@dataclass(frozen=True)
class Served:
    """A running gateway over an engine in this process. `key` may do everything; `folders` are its adapters by name."""

    url: str
    key: str
    engine: Engine
    gateway: Gateway
    app: Any
    folders: dict[str, Path]

    @property
    def headers(self) -> dict[str, str]:
        """What a request needs to be let in."""
        return {"Authorization": f"Bearer {self.key}"}


@contextmanager
def gateway_over(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    adapters: tuple[str, ...] = (),
    views: Views | None = None,
    pooling: Any = None,
    limits: Limits | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve a model in memory with adapters that PEFT writes, filled with random numbers, until the block ends.

    `views` is what the gateway knows of keys and names; without it one key may use the base and all adapters.
    """
    folders = {name: save_peft_adapter(model, folder / name, seed, r=4, lora_alpha=8) for seed, name in enumerate(adapters)}
    engine = Engine(model, tokenizer, limits=limits, pooling=pooling)
    chosen = ServeSettings(**{"served_name": BASE, "docs": True} | settings)
    gateway = Gateway(
        chosen, EngineBackend(engine, folders), tokenizer, views or FixedViews(local_view(KEY, chosen.served_name, folders))
    )
    app = make_app(gateway)
    with serving(app) as url:
        yield Served(url, KEY, engine, gateway, app, folders)
