"""vLLM behind the gateway: the same tenants, routes and figures over another engine, which only the gateway can reach.

backend      the gateway's side: tokens in, events out, over a socket in a folder of its own
supervisor   starts vLLM, watches it, starts it again, and leaves nothing behind
keeper       the process between the two, which outlives neither
plugin       inside vLLM: adapters come from the registry, and from nowhere else
checking     what vLLM would serve wrongly, and why
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Served": "luthier.serve.vllm.checking",
        "VllmBackend": "luthier.serve.vllm.backend",
        "VllmSettings": "luthier.serve.vllm.settings",
        "check_for_vllm": "luthier.serve.vllm.checking",
        "vllm_backend": "luthier.serve.vllm.backend",
    },
)
