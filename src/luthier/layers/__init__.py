"""Classes whose instances carry adapters. A layer is adapted by changing its class, so its name and weights stay its own.

This room never walks a model (`luthier.adapt` does) and never reads a file.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AdaptedModule": "luthier.layers.base",
        "LoraAttention": "luthier.layers.attention",
        "LoraConv1D": "luthier.layers.linear",
        "LoraConvolution": "luthier.layers.conv",
        "LoraEmbedding": "luthier.layers.embedding",
        "LoraLinear": "luthier.layers.linear",
        "LoraPair": "luthier.layers.pair",
        "Roster": "luthier.layers.roster",
        "layer_kind": "luthier.layers.kinds",
    },
)
