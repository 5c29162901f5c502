"""run(): one app on one socket, from the first request to the last.

SIGTERM or SIGINT     no new requests; running answers go on for `drain_seconds`, then they are cancelled
the second signal     at once
"""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import uvicorn

from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, before anything slow is begun; it takes connections once the server runs.

    Raises: ConfigError where the address is not this machine's, or somebody has it.
    """
    try:
        [(family, kind, protocol, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}") from error
    sock = socket.socket(family, kind, protocol)
    try:
        # Or the connections of a server that ended a moment ago would keep its port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _taken(host, port, error) from error
    return sock


async def run(
    app: "FastAPI",
    sock: socket.socket,
    *,
    drain_seconds: float,
    on_ready: Callable[[], None],
    on_stop: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a stop signal, and return once what was to be finished is.

    `on_ready` is called when requests are taken, `on_stop` with the first signal.

    Raises: ConfigError where somebody else began to listen on the address meanwhile.
    """
    config = uvicorn.Config(
        app,
        access_log=False,  # request lines are ours (logs.py): uvicorn's would hold query strings
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(drain_seconds),
    )
    server = _Server(config, on_ready, on_stop)
    loop = asyncio.get_running_loop()
    for each in STOP_SIGNALS:
        loop.add_signal_handler(each, server.stop)
    try:
        await server.serve(sockets=[sock])
    finally:
        for each in STOP_SIGNALS:
            loop.remove_signal_handler(each)


class _Server(uvicorn.Server):
    """uvicorn's server with signals that mean what this file says: its own would end the process by the signal, not by 0."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stop: Callable[[], None]):
        super().__init__(config)
        self._on_ready, self._on_stop = on_ready, on_stop

    def stop(self) -> None:
        """The first time: take nothing new. The second time: wait for nobody."""
        if self.should_exit:
            self.force_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            return
        self.should_exit = True
        self._on_stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        assert sockets
        try:
            await super().startup(sockets)
        except OSError as error:
            host, port = sockets[0].getsockname()[:2]
            raise _taken(host, port, error) from error
        self._on_ready()

    def capture_signals(self) -> Any:
        """Leave signals to `run`."""
        return contextlib.nullcontext()


def _taken(host: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on {host} port {port}: {error.strerror}. Take another with --port; 0 is any that is free")
