"""Parts of known decoder blocks, computed by `luthier.ops`: RMS norm, gated MLP, attention over packed documents.

A module is fused as it is adapted: its class is changed to a subclass of its own, its children and parameters stay where they
are, and the class comes back. Whatever a fused forward was not made for goes to the module's own.

Never decides which modules to fuse (`luthier.adapt.fusing` does, and compares each with the original first).
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from luthier.layers.linear import LoraLinear, is_autocast
from luthier.layers.packed import PackedLinear
from luthier.ops.attention import document_attention
from luthier.ops.documents import Documents
from luthier.ops.elementwise import rms_norm, rotate
from luthier.ops.gated import gated_projection
from luthier.ops.products import fast_products
from luthier.ops.projection import Projection, adapted_projections


class FusedModule(nn.Module):
    """A module whose class was changed by `fuse_module`."""

    unfused_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so copying and pickling must name its parts.
        return _new_fused, (type(self).__bases__[0], self.unfused_class), self.__getstate__()


class FusedNorm(FusedModule):
    """An RMS norm as in Llama, with a frozen weight."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.requires_grad or is_autocast(hidden_states):
            return cast(Tensor, super().forward(hidden_states))
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return rms_norm(hidden_states, self.weight, cast(float, eps))


class FusedGatedMLP(FusedModule):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), saving x, gate and up once each."""

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.get_submodule(name) for name in ("gate_proj", "up_proj", "down_proj")]
        parts = [projection_of(layer, x) for layer in layers]
        if any(part is None for part in parts):
            return cast(Tensor, super().forward(x))
        gate, up, down = cast(list[Projection], parts)
        products = fast_products(x)
        gates_x, up_x = map(finished, layers[:2], adapted_projections(x, [gate, up], products=products))
        return finished(layers[2], gated_projection(gates_x, up_x, down, products=products))


class FusedAttention(FusedModule):
    """Causal self-attention with rotary positions, over a packed row of documents.

    Without `documents` (or with a cache) it is the model's own attention.
    """

    head_dim: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> Any:
        if documents is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)
        assert position_embeddings is not None and kwargs.get("past_key_values") is None
        q, k, v = self._project(hidden_states, "q_proj", "k_proj", "v_proj")
        q_NHD, k_NKD, v_NKD = (each.view(documents.num_tokens, -1, self.head_dim) for each in (q, k, v))
        if hasattr(self, "q_norm"):
            q_NHD, k_NKD = self.get_submodule("q_norm")(q_NHD), self.get_submodule("k_norm")(k_NKD)
        cos, sin = (each.reshape(documents.num_tokens, -1) for each in position_embeddings)
        o_NHD = document_attention(rotate(q_NHD, cos, sin), rotate(k_NKD, cos, sin), v_NKD, documents, self.scaling)
        return self._project(o_NHD.reshape(*hidden_states.shape[:-1], -1), "o_proj")[0], None

    def _project(self, x: Tensor, *names: str) -> Sequence[Tensor]:
        layers = [self.get_submodule(name) for name in names]
        parts = [projection_of(layer, x) for layer in layers]
        if any(part is None for part in parts):
            return [layer(x) for layer in layers]
        outputs = adapted_projections(x, cast(list[Projection], parts), products=fast_products(x))
        return list(map(finished, layers, outputs))


def projection_of(layer: nn.Module, x: Tensor) -> Projection | None:
    """Return a linear layer as the fast path takes it, for an input like `x`; None where it must be called as it is.

    What the fast path gives is the layer's output only after `finished`.
    """
    if isinstance(layer, LoraLinear):
        return layer.projection(x)
    if not isinstance(layer, nn.Linear) or type(layer) not in (nn.Linear, PackedLinear):
        return None
    if layer.weight.dtype != x.dtype or is_autocast(x):
        return None
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return None
    return Projection(layer.weight, layer.bias)


def needs_finishing(layer: nn.Module) -> bool:
    """Return whether what a projection gives is not the layer's output yet."""
    return isinstance(layer, LoraLinear) and layer.has_live_magnitude


def finished(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the layer's output, given what its projection gave."""
    return layer.finished(output) if isinstance(layer, LoraLinear) else output


_CLASSES: dict[tuple[type, type], type[FusedModule]] = {}


def fuse_module(module: nn.Module, fused: type[FusedModule]) -> None:
    """Change the class of `module` to one that is both its own and `fused`."""
    module.__class__ = _fused_class(fused, type(module))


def unfuse_module(module: FusedModule) -> None:
    """Give `module` its own class back."""
    module.__class__ = module.unfused_class  # type: ignore[assignment]


def _fused_class(fused: type[FusedModule], own: type[nn.Module]) -> type[FusedModule]:
    if (fused, own) not in _CLASSES:
        body = {"unfused_class": own, "__module__": fused.__module__}
        _CLASSES[fused, own] = type(f"{fused.__name__}[{own.__name__}]", (fused, own), body)
    return _CLASSES[fused, own]


def _new_fused(fused: type[FusedModule], own: type[nn.Module]) -> FusedModule:
    cls = _fused_class(fused, own)
    return cls.__new__(cls)
