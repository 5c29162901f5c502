"""The equations made fast. Each function has a plain twin, `<name>_plain`, and a test that holds the two together.

Functions of tensors only: this room knows no module, no model and no file. Each saves for the backward pass as little as it
can and forms the rest anew where that is cheap. Nothing here assumes a device.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Documents": "luthier.ops.documents",
        "Projection": "luthier.ops.projection",
        "adapted_projections": "luthier.ops.projection",
        "document_attention": "luthier.ops.attention",
        "gated_projection": "luthier.ops.gated",
        "labelled_cross_entropy": "luthier.ops.cross_entropy",
        "rescaled": "luthier.ops.dora",
        "rms_norm": "luthier.ops.elementwise",
        "rotate": "luthier.ops.elementwise",
        "use_compiler": "luthier.ops.compiler",
    },
)
