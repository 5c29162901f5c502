"""The engine behind `luthier serve`: in a process of its own, in the gateway's, or vLLM."""

import asyncio
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from luthier.serve.backend import Backend
    from luthier.serve.settings import EngineSettings

ENGINES = ("process", "inline", "vllm")
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Started:
    """An engine that answers. `lines` are (title, words) for people, `facts` the same for programs."""

    backend: "Backend"
    tokenizer: Any
    fingerprint: dict[str, Any]
    facts: dict[str, Any]
    lines: list[tuple[str, str]]


def check_engine(engine: str, settings: "EngineSettings", vllm_python: Path | None) -> None:
    """Raise ConfigError for an engine that is unknown, or is given what has no effect on it."""
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine} is unknown.{did_you_mean(engine, ENGINES)} Write {', '.join(ENGINES)}")
    if engine != "vllm":
        if vllm_python is not None:
            raise ConfigError("--vllm-python has no effect without --engine vllm")
        return
    idle = {
        "--adapter": bool(settings.adapters),
        "--quantize": settings.quantize != "none",
        "--form": settings.form is not None,
        "--kv-tokens": settings.kv_tokens is not None,
    }
    if given := [flag for flag, is_given in idle.items() if is_given]:
        raise ConfigError(f"{', '.join(given)}: for the embedded engine only; vLLM serves versions of a registry")


async def start_engine(
    engine: str, settings: "EngineSettings", threads: int | None, vllm_python: Path | None, tell: Tell
) -> Started:
    """Start the engine that was asked for. Raises: what loading its base raises."""
    if engine == "vllm":
        return await _vllm(settings, vllm_python, tell)
    from luthier.models.load import read_tokenizer

    backend, facts = await (_inline if engine == "inline" else _process)(settings, threads, tell)
    fingerprint = facts.pop("fingerprint")
    waiting = "sleep" if facts["wait_policy"] == "passive" else "spin"
    lines = [
        ("weights", f"{facts['dtype']} Held as {facts['form']}."),
        (
            "limits",
            f"{facts['max_running']} requests at a time over {facts['max_active_adapters']} adapters, "
            f"{facts['kv_tokens']:,} tokens in hand",
        ),
        ("engine", f"{engine}, {facts['threads']} threads that {waiting} while they wait"),
    ]
    if facts["slow_because"]:
        lines.append(("slow", f"one request after another: {facts['slow_because']}"))
    return Started(backend, read_tokenizer(Path(facts["path"])), fingerprint, facts, lines)


async def _process(settings: "EngineSettings", threads: int | None, tell: Tell) -> "tuple[Backend, dict[str, Any]]":
    from luthier.core.torchless import keep_torch_out
    from luthier.serve.process import ProcessBackend

    keep_torch_out()
    backend = ProcessBackend(settings, progress=tell, threads=threads)
    await backend.start()
    return backend, dict(backend.facts)


async def _inline(settings: "EngineSettings", threads: int | None, tell: Tell) -> "tuple[Backend, dict[str, Any]]":
    from luthier.serve.embedded import load_backend

    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    backend, facts = await asyncio.to_thread(load_backend, settings, tell)
    return backend, dataclasses.asdict(facts)


async def _vllm(settings: "EngineSettings", python: Path | None, tell: Tell) -> Started:
    from luthier.core.torchless import keep_torch_out
    from luthier.models.fetch import pull
    from luthier.models.load import read_tokenizer
    from luthier.serve.vllm import Served, VllmSettings, vllm_backend

    path = await asyncio.to_thread(pull, settings.model, progress=tell)  # a GGUF file is converted with torch
    keep_torch_out()
    tokenizer = read_tokenizer(path)
    places = {"max_loras": settings.max_active_adapters, "max_cpu_loras": max(64, settings.max_active_adapters + 1)}
    chosen = VllmSettings(dtype=settings.dtype, **places, **({} if python is None else {"python": python}))
    backend = vllm_backend(path, tokenizer, chosen, registry=settings.registry)
    tell(f"Starting vLLM over {path}; that takes minutes on some machines")
    await backend.start()
    served = Served.read(backend.supervisor.place.base_file)
    facts = {"path": str(path), "dtype": settings.dtype, "max_active_adapters": settings.max_active_adapters}
    return Started(
        backend,
        tokenizer,
        dict(served.fingerprint),
        facts,
        [("engine", f"vLLM, {settings.max_active_adapters} adapters at a time")],
    )
