"""A gateway over a registry and a scripted engine, in a process that tests kill: python killed_server.py REGISTRY STATE"""

import asyncio
import sys
from pathlib import Path

import uvicorn
from tests.gateway_scene import ScriptedBackend

from luthier.registry.place import open_registry
from luthier.serve.app import make_app
from luthier.serve.settings import ServeSettings
from luthier.serve.watched import watched_gateway


async def serve(place: str, state: Path) -> None:
    """Serve until killed. Prompts come as token ids, so nobody asks for a tokenizer."""
    settings = ServeSettings(served_name="base", state=state, refresh_seconds=0.1)
    gateway = watched_gateway(settings, ScriptedBackend(), None, open_registry(place))
    server = uvicorn.Server(uvicorn.Config(make_app(gateway), host="127.0.0.1", port=0, log_config=None))
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await running


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
