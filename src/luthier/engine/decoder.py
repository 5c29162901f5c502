"""The engine's own forward of a decoder: weights laid out for reading, many requests in one flat batch of rows.

Never decides which rows run, never samples. The forward is the model's own equations; `decoder_for` compares the two before
anything is served.

Shapes: T rows of a step (tokens of several requests), I hidden width, H heads, D head width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.engine.attention import StepAttention
from luthier.engine.layouts import Block, Layout, Norm, Projection
from luthier.engine.stacks import StepAdapters
from luthier.ops.prepacked import Form, prepacked


class _Multiplied:
    """A projection whose parts are one product, its bias apart, since an adapter's magnitude must not scale it."""

    def __init__(self, projection: Projection, dtype: torch.dtype, form: Form):
        self.projection = projection.without_numbers()
        # Codes are made of the weights as they are kept, not as they are multiplied.
        weights = [weight.to(dtype) if form == "float" else weight for weight in projection.weights]
        self.product = prepacked(*weights, form=form)
        self.bias: Tensor | None = None
        if any(bias is not None for bias in projection.biases):
            parts = [
                weight.new_zeros(len(weight), dtype=dtype) if bias is None else bias.to(dtype)
                for weight, bias in zip(projection.weights, projection.biases, strict=True)
            ]
            self.bias = torch.cat(parts)

    def weight(self, path: str) -> Tensor:
        """Return the weight of one part again."""
        start = 0
        for own, width in zip(self.projection.paths, self.projection.widths, strict=True):
            if own == path:
                return self.product.dense()[start : start + width]
            start += width
        raise KeyError(path)

    def __call__(self, x_TI: Tensor, adapters: StepAdapters) -> Tensor:
        return adapters.add(self.projection, self.product(x_TI), x_TI, self.bias)


class _BlockForward:
    def __init__(self, block: Block, dtype: torch.dtype, form: Form, keeps_codes: bool):
        def multiplied(projection: Projection) -> _Multiplied:
            # In a base that is in 4 bits, what was left out of that stays as it is.
            return _Multiplied(projection, dtype, "float" if keeps_codes and not projection.is_packed else form)

        self.block = replace(
            block,
            qkv=block.qkv.without_numbers(),
            o=block.o.without_numbers(),
            gate_up=block.gate_up.without_numbers(),
            down=block.down.without_numbers(),
        )
        self.qkv, self.o = multiplied(block.qkv), multiplied(block.o)
        self.gate_up, self.down = multiplied(block.gate_up), multiplied(block.down)


class Decoder:
    """A base model ready to be served. It keeps copies of the weights in the layout that reads fastest, or in fewer bits."""

    def __init__(self, layout: Layout, dtype: torch.dtype, form: Form = "float"):
        self.dtype, self.kept_in = dtype, layout.embedding.dtype
        self.device = layout.embedding.device
        self._blocks = [_BlockForward(block, dtype, form, keeps_codes=layout.is_packed) for block in layout.blocks]
        # What decides between tokens is kept finer, and quantised bases leave it as it is.
        self._head = _Multiplied(layout.head, dtype, {"int4": "int8", "nf4": "float"}.get(form, form))  # type: ignore[arg-type]
        self._embedding = layout.embedding.to(dtype)
        # What stays of the layout has no numbers but norms and biases, so the model it came from can go.
        blocks = tuple(forward.block for forward in self._blocks)
        self.layout = replace(layout, blocks=blocks, head=layout.head.without_numbers(), embedding=layout.embedding.to("meta"))

    @property
    def projections(self) -> list[Projection]:
        """All products that an adapter may add to."""
        return [projection for block in self.layout.blocks for projection in block.projections] + [self.layout.head]

    def weight(self, name: str) -> Tensor:
        """Return the weight of a projection or the embedding by its name in the base model, dense; raises KeyError for others."""
        path = name.removesuffix(".weight")
        if path == self.layout.embedding_path:
            return self._embedding
        return self._by_path[path].weight(path)

    @cached_property
    def _by_path(self) -> dict[str, _Multiplied]:
        each = [own for forward in self._blocks for own in (forward.qkv, forward.o, forward.gate_up, forward.down)]
        return {path: own for own in (*each, self._head) for path in own.projection.paths}

    def hidden(self, ids_T: Tensor, positions_T: Tensor, adapters: StepAdapters, attention: StepAttention) -> Tensor:
        """Return the last hidden states (T, I), the last norm applied, of the rows of one step."""
        x_TI = F.embedding(ids_T, self._embedding)
        if self.layout.embedding_scale is not None:
            x_TI = x_TI * self.layout.embedding_scale.to(self.dtype)
        angles = {kind: self._angles(rope(positions_T)) for kind, rope in self.layout.ropes.items()}
        for layer, forward in enumerate(self._blocks):
            block = forward.block
            seen = self._attention(layer, forward, _normed(x_TI, block.attention_norm), angles[block.rope], adapters, attention)
            x_TI = x_TI + (seen if block.after_attention is None else _normed(seen, block.after_attention))
            gated = self._gated(forward.gate_up(_normed(x_TI, block.mlp_norm), adapters))
            made = forward.down(gated, adapters)
            x_TI = x_TI + (made if block.after_mlp is None else _normed(made, block.after_mlp))
        return _normed(x_TI, self.layout.norm)

    def logits(self, hidden_TI: Tensor, adapters: StepAdapters) -> Tensor:
        """Return the logits (T, V) in float32 of some last hidden states."""
        logits_TV = self._head(hidden_TI, adapters).float()
        cap = self.layout.logit_softcap
        return logits_TV if cap is None else torch.tanh(logits_TV / cap) * cap

    def _attention(
        self,
        layer: int,
        forward: _BlockForward,
        x_TI: Tensor,
        angles: tuple[Tensor, Tensor],
        adapters: StepAdapters,
        attention: StepAttention,
    ) -> Tensor:
        block = forward.block
        qkv = forward.qkv(x_TI, adapters).view(len(x_TI), -1, block.head_dim)
        both, values = qkv[:, : block.heads + block.kv_heads], qkv[:, block.heads + block.kv_heads :]
        if block.q_norm is not None and block.k_norm is not None:
            both = torch.cat([_normed(both[:, : block.heads], block.q_norm), _normed(both[:, block.heads :], block.k_norm)], 1)
        both = _rotated(both, *angles)
        seen = attention.attend(layer, block, both[:, : block.heads], both[:, block.heads :], values)
        return forward.o(seen, adapters)

    def _gated(self, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[1] // 2
        return self.layout.activation(gate_up[:, :width]).mul_(gate_up[:, width:])

    def _angles(self, cos_sin: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(T, 1, D) cosines, and (T, 1, D / 2) sines, of which both halves are the same."""
        cos, sin = (each.to(self.dtype)[:, None] for each in cos_sin)
        return cos, sin[..., : sin.shape[-1] // 2].contiguous()


def _normed(x: Tensor, norm: Norm) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _rotated(heads_THD: Tensor, cos_T1D: Tensor, half_sin_T1: Tensor) -> Tensor:
    """Turn the halves of each head by its token's angles, as `ops.elementwise.rotate_plain` does."""
    left, right = heads_THD.chunk(2, dim=-1)
    turned = heads_THD * cos_T1D
    half = left.shape[-1]
    turned[..., :half].addcmul_(right, half_sin_T1, value=-1)
    turned[..., half:].addcmul_(left, half_sin_T1)
    return turned
