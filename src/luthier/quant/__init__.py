"""Base weights in 4 bits: how they are stored, and how they are read back.

Knows tensors only, no layer, model or file.
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "NF4Weight": "luthier.quant.nf4",
        "dequantize_nf4": "luthier.quant.nf4",
        "dequantize_nf4_plain": "luthier.quant.nf4",
        "from_keys": "luthier.quant.keys",
        "nf4_bytes": "luthier.quant.nf4",
        "quantize_nf4": "luthier.quant.nf4",
        "to_keys": "luthier.quant.keys",
    },
)
