"""Which decoder is this? Reads the parts of a transformers model that the engine's own forward needs, or says why it cannot.

Only architectures whose source was read are taken; `Decoder` compares itself with the model on top of that. All others are
served through their own forward (`luthier.engine.fallback`), slower and as right.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.errors import ModelError
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor

KNOWN = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""Model types (`config.model_type`) whose blocks are known."""

_ONE_PLUS = ("gemma", "gemma2", "gemma3_text")
"""Their norms multiply by 1 + weight, and their embeddings by a constant."""


def is_known(model: Any) -> bool:
    """Whether the engine has a forward for models of this type. Each one is compared with it all the same."""
    return model.config.model_type in KNOWN


class UnknownLayoutError(ModelError):
    """The engine has no forward of its own for this model."""


@dataclass(frozen=True)
class Projection:
    """Layers that share their input, multiplied as one: paths in the base model, weights and biases in that order."""

    paths: tuple[str, ...]
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Outputs of each part."""
        return tuple(weight.shape[0] for weight in self.weights)

    @property
    def is_packed(self) -> bool:
        """Whether a part of it is in 4 bits in the model."""
        return any(isinstance(weight, PackedTensor) for weight in self.weights)

    def without_numbers(self) -> "Projection":
        """The same with weights that have a shape only: those that count have been laid out elsewhere."""
        shapes = tuple(torch.empty(weight.shape, dtype=weight.dtype, device="meta") for weight in self.weights)
        return Projection(self.paths, shapes, self.biases)


@dataclass(frozen=True)
class Norm:
    """An RMS norm; `weight` as it is multiplied, the 1 of Gemma's included."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Block:
    """One decoder layer. Norms that an architecture has not are None; `window` is None where attention sees everything."""

    attention_norm: Norm
    qkv: Projection
    q_norm: Norm | None
    k_norm: Norm | None
    o: Projection
    after_attention: Norm | None
    mlp_norm: Norm
    gate_up: Projection
    down: Projection
    after_mlp: Norm | None
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    rope: str

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Its products, in the order in which they are formed."""
        return (self.qkv, self.o, self.gate_up, self.down)


@dataclass(frozen=True)
class Layout:
    """A decoder: embedding, blocks, last norm, head. `ropes` gives (cos, sin), each (T, D), for positions (T,)."""

    embedding: Tensor
    embedding_path: str
    embedding_scale: Tensor | None
    blocks: tuple[Block, ...]
    norm: Norm
    head: Projection
    logit_softcap: float | None
    activation: Callable[[Tensor], Tensor]
    ropes: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = field(repr=False)
    longest: int | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the model's weights are in 4 bits."""
        return any(projection.is_packed for block in self.blocks for projection in block.projections)


def layout_of(model: Any) -> Layout:
    """Return the layout of a transformers causal language model without adapters; its tensors are the model's own.

    Raises: UnknownLayoutError with what stands in the way.
    """
    config = model.config
    if not is_known(model):
        raise UnknownLayoutError(f"model type {config.model_type!r} is not among {', '.join(KNOWN)}")
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    reader = _Reader(config, names, one_plus=config.model_type in _ONE_PLUS)
    if type(head) is not nn.Linear:
        raise UnknownLayoutError(f"the output layer is a {type(head).__name__}")
    embedding = decoder.embed_tokens
    scale = getattr(embedding, "embed_scale", None)
    if scale is not None:
        scale = torch.as_tensor(scale).to(embedding.weight.dtype)
    blocks = tuple(reader.block(block) for block in decoder.layers)
    kinds = {block.rope for block in blocks}
    return Layout(
        embedding=embedding.weight,
        embedding_path=names[embedding],
        embedding_scale=scale,
        blocks=blocks,
        norm=reader.norm(decoder.norm),
        head=reader.projection(head),
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        activation=reader.activation(),
        ropes={kind: _rope(decoder.rotary_emb, kind, config) for kind in kinds},
        longest=getattr(config, "max_position_embeddings", None),
    )


class _Reader:
    def __init__(self, config: Any, names: dict[nn.Module, str], one_plus: bool):
        self.config, self.names, self.one_plus = config, names, one_plus

    def norm(self, module: Any) -> Norm:
        eps = getattr(module, "variance_epsilon", None)
        weight = module.weight.detach()
        return Norm(weight.float().add(1.0) if self.one_plus else weight, float(module.eps if eps is None else eps))

    def projection(self, *modules: Any) -> Projection:
        for module in modules:
            if type(module) not in (nn.Linear, PackedLinear):
                raise UnknownLayoutError(f"{self.names[module]} is a {type(module).__name__}, not a plain linear layer")
        weights = tuple(module.weight.detach() for module in modules)
        biases = tuple(None if module.bias is None else module.bias.detach() for module in modules)
        return Projection(tuple(self.names[module] for module in modules), weights, biases)

    def block(self, block: Any) -> Block:
        attention, mlp = block.self_attn, block.mlp
        after = hasattr(block, "pre_feedforward_layernorm")
        between = block.pre_feedforward_layernorm if after else block.post_attention_layernorm
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        kinds = getattr(self.config, "layer_types", None)
        kind = kinds[attention.layer_idx] if kinds else "full_attention"
        if kind not in ("full_attention", "sliding_attention"):
            raise UnknownLayoutError(f"layer {attention.layer_idx} is of type {kind!r}")
        if not getattr(attention, "is_causal", True):
            raise UnknownLayoutError("attention looks ahead")
        window = getattr(self.config, "sliding_window", None) if kind == "sliding_attention" or kinds is None else None
        return Block(
            attention_norm=self.norm(block.input_layernorm),
            qkv=self.projection(attention.q_proj, attention.k_proj, attention.v_proj),
            q_norm=None if q_norm is None else self.norm(q_norm),
            k_norm=None if k_norm is None else self.norm(k_norm),
            o=self.projection(attention.o_proj),
            after_attention=self.norm(block.post_attention_layernorm) if after else None,
            mlp_norm=self.norm(between),
            gate_up=self.projection(mlp.gate_proj, mlp.up_proj),
            down=self.projection(mlp.down_proj),
            after_mlp=self.norm(block.post_feedforward_layernorm) if after else None,
            heads=attention.q_proj.out_features // attention.head_dim,
            kv_heads=attention.k_proj.out_features // attention.head_dim,
            head_dim=attention.head_dim,
            scale=float(attention.scaling),
            softcap=getattr(attention, "attn_logit_softcapping", None),
            window=window,
            rope=kind if self.config.model_type == "gemma3_text" else "all",
        )

    def activation(self) -> Callable[[Tensor], Tensor]:
        name = getattr(self.config, "hidden_activation", None) or self.config.hidden_act
        known: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": _gelu_tanh}
        if name in known:
            return known[name]
        raise UnknownLayoutError(f"the activation {name!r} is not known")


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _rope(rotary: Any, kind: str, config: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The model's own module gives the angles, so every scaling it knows is right; those that depend on length are refused."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {kind: rotary.rope_type}
    if any(each in ("dynamic", "longrope") for each in kinds.values()):
        raise UnknownLayoutError(f"rotary positions of type {kinds[kind]!r} depend on how long the text is")
    arguments = {"layer_type": kind} if isinstance(rotary.rope_type, dict) else {}

    def angles(positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = rotary(like, positions[None], **arguments)
        return cos[0], sin[0]

    return angles
