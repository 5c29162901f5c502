"""The gateway: tenants and their keys, OpenAI's API, routes from names to adapters, over an engine of ours or vLLM.

Talks to a `Backend` in tokens; knows nothing of tensors.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "ApiError": "luthier.serve.errors",
        "Backend": "luthier.serve.backend",
        "Gateway": "luthier.serve.gateway",
        "ServeSettings": "luthier.serve.settings",
        "make_app": "luthier.serve.app",
    },
)
