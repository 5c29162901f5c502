"""Adapters made from adapters, without a model and without training.

Reads folders and writes a new one; never changes the ones it was given.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "LayerTruncation": "luthier.compose.truncation",
        "Truncation": "luthier.compose.truncation",
        "truncate": "luthier.compose.truncation",
    },
)
