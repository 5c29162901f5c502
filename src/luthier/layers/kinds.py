"""Which kinds of layers can carry a pair, and why a given module cannot."""

import sys
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from luthier.layers.base import ADDED, AdaptedModule
from luthier.layers.embedding import LoraEmbedding
from luthier.layers.linear import LoraConv1D, LoraLinear


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its word, the class that carries its adapters, and the sizes I and O of a module of this kind."""

    word: str
    mixin: type[AdaptedModule]

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Return (I, O) of a module of this kind; for an embedding I is the number of rows."""
        rows, columns = cast(Tensor, module.weight).shape
        return (columns, rows) if self.word == "linear" else (rows, columns)


LINEAR = LayerKind("linear", LoraLinear)
EMBEDDING = LayerKind("embedding", LoraEmbedding)
CONV1D = LayerKind("conv1d", LoraConv1D)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of `module`, adapted or not; None if it is not a layer that can carry a pair."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    # transformers is heavy; where it is not loaded there is no Conv1D of its either.
    transformers_layers = sys.modules.get("transformers.pytorch_utils")
    if transformers_layers is not None and isinstance(module, transformers_layers.Conv1D):
        return CONV1D
    return None


def why_hidden(module: nn.Module, parent: nn.Module) -> str | None:
    """Return why whatever an adapter adds to or puts in place of this module would be ignored, or None."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance (dispatch hooks?), which hides the adapter: attach before that"
    if not isinstance(module, AdaptedModule) and (own := [name for name in ADDED if hasattr(module, name)]):
        return f"it has an attribute '{own[0]}' of its own, where the adapters would go"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised; remove the parametrisation first"
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads this weight itself and never calls the layer"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer's fast path reads this weight itself and never calls the layer"
    return None


def why_not(module: nn.Module, parent: nn.Module) -> str | None:
    """Return why a pair on this layer would be ignored or wrong, or None if nothing speaks against it."""
    if reason := why_hidden(module, parent):
        return reason
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight_norm? pruning?); make it a plain parameter first"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}; only floating-point weights can be adapted"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "max_norm rewrites the frozen table in place, and sparse gradients are not supported"
    if weight.ndim != 2:
        return f"its weight has shape {tuple(weight.shape)}, not two axes (sharded or offloaded?)"
    return None


def why_no_magnitude(module: nn.Module) -> str | None:
    """Return why a layer that can carry a pair cannot carry DoRA's, or None."""
    kind = layer_kind(module)
    if kind is None or not kind.mixin.carries_magnitude:
        return "use_dora is for Linear, Embedding and Conv1D layers"
    if not folding_is_exact(module):
        return "it has a forward of its own, and use_dora needs the plain product with its weight"
    return None


def folding_is_exact(module: nn.Module) -> bool:
    """Return whether the layer's own forward is linear in its weight, as a merge needs."""
    base = module.base_class if isinstance(module, AdaptedModule) else type(module)
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return True
    families: list[Any] = [cls for cls in base.__mro__ if cls.__module__.startswith(("torch.nn", "transformers.pytorch_utils"))]
    return base.forward is families[0].forward
