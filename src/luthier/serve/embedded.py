"""From EngineSettings to an engine of ours, and what is to be told of it. The only file of this room, beside tests, that has
torch loaded: in the engine's own process, or in the gateway's where the engine is `inline`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from luthier.core.threads import how_threads_wait
from luthier.serve.backend import EngineBackend
from luthier.serve.settings import EngineSettings


@dataclass(frozen=True)
class EngineFacts:
    """What an engine came to be. `path` is the folder of base and tokenizer, `threads_wait` how its threads wait for work,
    `fingerprint` that of the base, as plain JSON."""

    path: str
    fingerprint: dict[str, Any]
    dtype: str
    form: str
    max_running: int
    max_active_adapters: int
    kv_tokens: int
    max_request_tokens: int | None
    threads: int
    threads_wait: str
    slow_because: str | None


def load_backend(settings: EngineSettings, progress: Callable[[str], None] | None = None) -> tuple[EngineBackend, EngineFacts]:
    """Load the base and return an engine over it, ready to answer. Raises: what `Engine.load` and `open_registry` raise."""
    import torch
    from transformers.utils import logging as transformers_logging

    from luthier.engine import Engine
    from luthier.models import choose_dtype, parse_spec, pull
    from luthier.models.load import choose_device
    from luthier.registry.place import open_registry

    transformers_logging.disable_progress_bar()
    path = pull(parse_spec(settings.model), progress=progress)
    limits = {"max_rows": settings.max_running, "max_queue": settings.max_queue}
    limits |= {"max_active_adapters": settings.max_active_adapters}
    engine = Engine.load(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        form=settings.form_held,
        limits=limits if settings.kv_tokens is None else limits | {"kv_tokens": settings.kv_tokens},
        prefix_cache=settings.prefix_cache,
        adapter_bytes=settings.adapter_bytes,
        registry=None if settings.registry is None else open_registry(settings.registry),
        progress=progress,
    )
    facts = EngineFacts(
        path=str(path),
        fingerprint=engine.fingerprint.model_dump(mode="json"),
        dtype=choose_dtype(settings.dtype, choose_device(settings.device)).reason,
        form=settings.form_held,
        max_running=engine.limits.max_rows,
        max_active_adapters=engine.limits.max_active_adapters,
        kv_tokens=engine.limits.kv_tokens,
        max_request_tokens=engine.limits.max_request_tokens,
        threads=torch.get_num_threads(),
        threads_wait=how_threads_wait(os.environ),
        slow_because=engine.slow_because,
    )
    return EngineBackend(engine, settings.adapters), facts
