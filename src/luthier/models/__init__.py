"""Base models: name them, fetch and convert them once, load them in the precision that suits the machine.

Read in this order: spec.py (what a name means), fetch.py (name -> local folder), load.py (folder -> model). This room never
touches an adapter, never reads a pickle and reaches the network only for names that say so.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Checkpoint": "luthier.models.checkpoint",
        "DtypeChoice": "luthier.models.dtype",
        "LoadedModel": "luthier.models.load",
        "ModelSpec": "luthier.models.spec",
        "SpecKind": "luthier.models.spec",
        "base_config": "luthier.models.load",
        "choose_dtype": "luthier.models.dtype",
        "load_model": "luthier.models.load",
        "meta_model": "luthier.models.blueprint",
        "models_home": "luthier.models.cache",
        "parse_spec": "luthier.models.spec",
        "pull": "luthier.models.fetch",
        "pulled": "luthier.models.fetch",
        "read_config": "luthier.models.blueprint",
    },
)
