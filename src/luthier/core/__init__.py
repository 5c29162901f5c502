"""LoRA's equations in plain torch, the configuration, the names and the errors.

This room knows no model and prints nothing, and touches the disk only in `atomic`, which every writer above uses. All of it
but `lora` and `adalora` loads no torch.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AdaLoraConfig": "luthier.core.config",
        "LoraConfig": "luthier.core.config",
        "LuthierError": "luthier.core.errors",
        "lora_delta": "luthier.core.lora",
        "lora_embedding": "luthier.core.lora",
        "lora_linear": "luthier.core.lora",
        "lora_scaling": "luthier.core.lora",
    },
)
