"""`luthier serve --engine vllm`: from the command's words to a vLLM that answers, and what is told of it."""

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import typer

    from luthier.serve.vllm.backend import VllmBackend
    from luthier.serve.vllm.settings import VllmSettings

OTHERS = ("adapter", "quantize", "form", "threads", "kv_tokens", "adapter_mib")
"""Options that say something of the embedded engine only."""


def vllm_settings(context: "typer.Context", words: list[str], **given: Any) -> "VllmSettings":
    """Return how vLLM is started. `words` are KEY=VALUE; `given` come from options that both engines have.

    Raises: ConfigError for options that would have no effect on vLLM, and for what vLLM cannot be.
    """
    from luthier.serve.vllm.settings import VllmSettings

    idle = [f"--{name.replace('_', '-')}" for name in OTHERS if _is_said(context, name)]
    if idle:
        raise ConfigError(f"{' and '.join(idle)} would have no effect on vLLM; they are for --engine process and inline")
    values = {name: value for name, value in given.items() if value is not None}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in VllmSettings.model_fields:
            near, known = did_you_mean(name, VllmSettings.model_fields), ", ".join(VllmSettings.model_fields)
            raise ConfigError(f"--vllm {word}: write KEY=VALUE.{near} Known keys: {known}")
        values[name] = tuple(shlex.split(text)) if name == "more" else text
    return VllmSettings(**values)


async def start_vllm(
    model: str, settings: "VllmSettings", registry: str, progress: Callable[[str], None]
) -> "tuple[VllmBackend, dict[str, Any]]":
    """Return a vLLM that answers, and what is to be told of it. Raises: ConfigError, ModelError, EngineError."""
    from luthier.core.torchless import keep_torch_out
    from luthier.models import parse_spec, pull
    from luthier.models.load import read_tokenizer
    from luthier.serve.vllm.backend import vllm_backend
    from luthier.serve.vllm.checking import Served

    path = await asyncio.to_thread(pull, parse_spec(model), progress=progress)
    keep_torch_out()  # only now: a GGUF file that is converted needs it
    backend = vllm_backend(path, read_tokenizer(Path(path)), settings, registry=registry)
    progress("Starting vLLM, which takes a minute or several")
    await backend.start()
    supervisor = backend.supervisor
    assert supervisor.found is not None
    facts = {
        "path": str(path),
        "fingerprint": dict(Served.read(supervisor.place.base_file).fingerprint),
        "dtype": settings.dtype,
        "max_running": settings.max_running,
        "max_active_adapters": settings.max_loras,
        "max_lora_rank": supervisor.max_rank,
        "max_request_tokens": await backend.room(),
        "vllm": supervisor.found.version,
        "device": "cpu" if supervisor.is_cpu else "gpu",
        "network": supervisor.network,
    }
    return backend, facts


def lines_of(facts: dict[str, Any]) -> list[str]:
    """Return what is said of a vLLM that has started."""
    network = "a network of its own" if facts["network"] == "none" else "the machine's network"
    return [
        f"  weights   dtype {facts['dtype']}",
        f"  limits    {facts['max_running']} requests at a time over {facts['max_active_adapters']} adapters of rank "
        f"{facts['max_lora_rank']} at most, {facts['max_request_tokens']:,} tokens each",
        f"  engine    vLLM {facts['vllm']} on the {facts['device']}, behind a socket, in {network}",
    ]


def _is_said(context: "typer.Context", name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
