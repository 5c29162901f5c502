"""Which kinds of layers can carry a pair, and why a given module cannot."""

import sys
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from luthier.layers.attention import LoraAttention
from luthier.layers.base import ADDED, AdaptedModule
from luthier.layers.conv import LoraConvolution
from luthier.layers.embedding import LoraEmbedding
from luthier.layers.linear import LoraConv1D, LoraLinear
from luthier.layers.parameters import LoraParameters


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer: its word, the class that carries its adapters, and the sizes I and O of a module of this kind."""

    word: str
    mixin: type[AdaptedModule]

    def sizes(self, module: nn.Module) -> tuple[int, int]:
        """Return (I, O) of a module of this kind; for an embedding I is the number of rows."""
        if isinstance(module, CONVOLUTIONS):
            return module.in_channels, module.out_channels
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim, 3 * module.embed_dim
        rows, columns = cast(Tensor, module.weight).shape
        return (columns, rows) if self.word == "linear" else (rows, columns)

    def kernel(self, module: nn.Module) -> tuple[int, ...]:
        """Return the axes of a convolution's window; () for other layers."""
        return tuple(module.kernel_size) if isinstance(module, CONVOLUTIONS) else ()

    def groups(self, module: nn.Module) -> int:
        """Return the groups of a convolution, of which each has its own channels; 1 for other layers."""
        return module.groups if isinstance(module, CONVOLUTIONS) else 1


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LINEAR = LayerKind("linear", LoraLinear)
EMBEDDING = LayerKind("embedding", LoraEmbedding)
CONV1D = LayerKind("conv1d", LoraConv1D)
CONVOLUTION = LayerKind("convolution", LoraConvolution)
ATTENTION = LayerKind("attention", LoraAttention)
PARAMETER = LayerKind("parameter", LoraParameters)
"""Any module of which parameters are adapted; `sizes` are those of a parameter, not of the module."""


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of `module`, adapted or not; None if it is not a layer that can carry a pair."""
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, CONVOLUTIONS):
        return CONVOLUTION
    if isinstance(module, nn.MultiheadAttention):
        return ATTENTION
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
    if isinstance(module, LoraParameters) and module.lora:
        return "another adapter adapts its parameters themselves (target_parameters); detach that one first"
    is_attention = isinstance(module, nn.MultiheadAttention)
    weight = module._parameters.get("in_proj_weight" if is_attention else "weight")
    if weight is None and is_attention:
        return "its q, k and v have sizes of their own (kdim, vdim), and so no common weight"
    if weight is None:
        return "its weight is computed from other parameters (weight_norm? pruning?); make it a plain parameter first"
    if not weight.is_floating_point():
        return f"its weight is stored as {weight.dtype}; only floating-point weights can be adapted"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return "max_norm rewrites the frozen table in place, and sparse gradients are not supported"
    axes = 2 + len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 2
    if weight.ndim != axes:
        return f"its weight has shape {tuple(weight.shape)}, not {axes} axes (sharded or offloaded?)"
    return None


def parameter_kind(module: nn.Module, key: str) -> LayerKind:
    """Return what carries a pair on the parameter `key` of `module`.

    A linear layer's weight gets the pair of the layer itself: it computes the same, and the sum is never formed.
    """
    return LINEAR if isinstance(module, nn.Linear) and key == "weight" and not _has_own_forward(module) else PARAMETER


def why_not_parameter(module: nn.Module, parent: nn.Module, key: str) -> str | None:
    """Return why a pair on the parameter `key` of `module` would be ignored or wrong, or None if nothing speaks against it."""
    if parameter_kind(module, key) is LINEAR:
        return why_not(module, parent)
    if reason := why_hidden(module, parent):
        return reason
    weight = cast(Tensor, module._parameters[key])
    base = module.base_class if isinstance(module, AdaptedModule) else type(module)
    if base.forward is nn.Module.forward:
        return f"a {base.__name__} is never called, so whoever reads the parameter would read it without the adapter"
    if isinstance(module, nn.RNNBase):
        return f"a {base.__name__} reads its weights from a list of its own, without the adapter"
    if isinstance(module, nn.Embedding):
        return "it is an embedding's table; name the embedding in target_modules"
    if isinstance(module, AdaptedModule) and module.lora and not isinstance(module, LoraParameters):
        return "another adapter adapts the layer itself (target_modules); detach that one first"
    if weight.ndim not in (2, 3):
        return f"it has shape {tuple(weight.shape)}; only matrices and stacks of matrices, 2 or 3 axes, can be adapted"
    if not weight.is_floating_point() or weight.itemsize < 2:
        return f"it is stored as {weight.dtype}; only float16, bfloat16, float32 and float64 can be adapted"
    return None


def why_no_magnitude(module: nn.Module) -> str | None:
    """Return why a layer that can carry a pair cannot carry DoRA's, or None."""
    kind = layer_kind(module)
    if kind is None or not kind.mixin.carries_magnitude:
        return "use_dora is for Linear, Embedding, Conv1D and Conv1d/2d/3d layers"
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        # PEFT 0.21 takes the norm of a product whose rows belong to several outputs; an adapter of it has no other meaning.
        return f"it has {module.groups} groups, and PEFT's norm in use_dora is not that of an output then; leave it out"
    if why_not_folded(module):
        return "it has a forward of its own, and use_dora needs the plain product with its weight"
    return None


def why_not_folded(module: nn.Module) -> str | None:
    """Return why a merge may change the output: the layer's own forward may not be linear in its weight, or the weight may
    have no place for the update. None if it is exact.

    With groups the update is (O, I, K...) and reaches every input channel, while the weight (O, I / groups, K...) has only
    those of its own group.
    """
    if isinstance(module, LoraParameters) and module.lora:
        return None  # its own forward reads the very sum that a merge writes
    base = module.base_class if isinstance(module, AdaptedModule) else type(module)
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return None
    if isinstance(module, CONVOLUTIONS) and module.groups > 1:
        return f"has {module.groups} groups, and its weight has no place for an update that reaches from one to another"
    if _has_own_forward(module):
        return f"is a {base.__name__} with a forward of its own, so folding the update into its weight may change its output"
    return None


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether the module's class computes something else than the layer of torch or transformers that it comes from."""
    base = module.base_class if isinstance(module, AdaptedModule) else type(module)
    families: list[Any] = [cls for cls in base.__mro__ if cls.__module__.startswith(("torch.nn", "transformers.pytorch_utils"))]
    return base.forward is not families[0].forward
