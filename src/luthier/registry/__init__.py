"""Which base, data, metrics, owner and deployments belong to every adapter version, and what may go out.

Imports no torch: adapters are files and records here, never tensors.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Registry": "luthier.registry.place",
        "migrate": "luthier.registry.migrations",
        "open_registry": "luthier.registry.place",
    },
)
