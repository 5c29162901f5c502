"""luthier: the whole life of a LoRA adapter. Public names load on first use, so importing this costs nothing."""

from luthier.core.lazy import lazy_names

__version__ = "0.1.0"

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AdaLoraConfig": "luthier.core.config",
        "AttachPlan": "luthier.adapt.planning",
        "LoraConfig": "luthier.core.config",
        "LuthierError": "luthier.core.errors",
        "activate": "luthier.adapt.switching",
        "adapter_parameters": "luthier.adapt.state",
        "attach": "luthier.adapt.attaching",
        "attach_loftq": "luthier.adapt.loftq",
        "detach": "luthier.adapt.attaching",
        "disabled": "luthier.adapt.switching",
        "generate": "luthier.engine.generation",
        "load_adapter": "luthier.formats.adapters",
        "load_model": "luthier.models.load",
        "merge": "luthier.adapt.merging",
        "plan": "luthier.adapt.planning",
        "quantize_linears": "luthier.adapt.packing",
        "save_adapter": "luthier.formats.adapters",
        "save_merged": "luthier.formats.merged",
        "swap_adapter": "luthier.formats.adapters",
        "unmerge": "luthier.adapt.merging",
    },
)
