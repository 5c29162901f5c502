"""Adapter folders on disk (PEFT's format, read and written without PEFT), and who a base model is by its weights.

Writes are atomic and deterministic, reads are strict, pickles are not read unless asked for. This room trains nothing.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AdapterFolder": "luthier.formats.folder",
        "Fingerprint": "luthier.formats.fingerprint",
        "LoadReport": "luthier.formats.adapters",
        "fingerprint_of": "luthier.formats.adapters",
        "load_adapter": "luthier.formats.adapters",
        "read_adapter": "luthier.formats.folder",
        "save_adapter": "luthier.formats.adapters",
        "save_merged": "luthier.formats.merged",
        "save_packed": "luthier.formats.merged",
        "swap_adapter": "luthier.formats.adapters",
    },
)
