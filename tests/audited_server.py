"""A gateway in a process of its own, which writes down every file that it opens: python audited_server.py CONFIG.json

Two ports: one of a gateway with a registry, one of a gateway with folders that were given by name. Both log all that there is to
log. What was opened while Python starts is not told, only what requests bring about.
"""

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn

from luthier.engine import Engine
from luthier.registry.place import open_registry
from luthier.serve.app import make_app
from luthier.serve.backend import EngineBackend
from luthier.serve.gateway import Gateway
from luthier.serve.settings import ServeSettings
from luthier.serve.views import FixedViews, local_view
from luthier.serve.watched import watched_gateway


def tell_opened(file: str) -> None:
    """Write the path of every file that is opened from now on into `file`, one to a line."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and not isinstance(args[0], int):
            os.write(log, os.fsencode(os.path.abspath(os.fsdecode(args[0]))) + b"\n")

    sys.addaudithook(hook)


async def serve(config: dict[str, Any]) -> None:
    """Serve until the standard input ends."""
    registry = open_registry(config["registry"])
    engine = Engine.load(config["base"], dtype="float32", registry=registry)
    settings = ServeSettings(
        served_name="tiny", state=Path(config["state"]), refresh_seconds=0.1, max_body_bytes=64 * 1024, max_waiting=16
    )
    gateways = [
        watched_gateway(settings, EngineBackend(engine), engine.tokenizer, registry),
        Gateway(
            settings,
            EngineBackend(engine, config["folders"]),
            engine.tokenizer,
            FixedViews(local_view(config["key"], "tiny", config["folders"])),
        ),
    ]
    servers = [
        uvicorn.Server(uvicorn.Config(make_app(gateway), host="127.0.0.1", port=0, log_config=None, access_log=False))
        for gateway in gateways
    ]
    for server in servers:
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = [asyncio.create_task(server._serve()) for server in servers]
    while not all(server.started for server in servers):
        await asyncio.sleep(0.01)
        for task in running:
            if task.done():
                task.result()
    tell_opened(config["opened"])
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    print(json.dumps(ports), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*running)


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    logging.basicConfig(filename=given["log"], level=logging.DEBUG)
    asyncio.run(serve(given))
