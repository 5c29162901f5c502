"""LoraAttention: `nn.MultiheadAttention` that carries adapters on its input and its output projection.

torch's module multiplies by both weights itself and calls no layer, so the weights W + scaling * B A are formed and given to
it for the one call; gradients flow through them. Dropout does not apply: the update never meets an input of its own.
"""

from typing import Any, cast

import torch
from torch import Tensor

from luthier.core.lora import lora_delta
from luthier.layers.base import AdaptedModule, bare
from luthier.layers.pair import LoraPair


class LoraAttention(AdaptedModule):
    """`nn.MultiheadAttention` with one size for q, k and v: in_proj_weight (3 I, I), out_proj.weight (I, I)."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        live = self.roster.live
        pairs = [(cast(LoraPair, self.lora[name]), weight) for name, weight in live.items() if name in self.lora]
        if not pairs:
            return super().forward(*args, **kwargs)
        replaced = next((name for name in live if name in self.replacements), None)
        base = bare(self) if replaced is None else self.replacements[replaced]
        dtype = cast(Tensor, self.in_proj_weight).dtype
        weights = {key: parameter.to(dtype) for key, parameter in base.named_parameters()}
        for key in ("in_proj_weight", "out_proj.weight"):
            total: Tensor = base.get_parameter(key)
            total = total.to(torch.promote_types(total.dtype, torch.float32))
            for pair, weight in pairs:
                part = pair if key == "in_proj_weight" else cast(LoraPair, pair.out)
                total = total + lora_delta(part.lora_A, part.lora_B, weight * part.scaling)
            weights[key] = total.to(dtype)
        return torch.func.functional_call(base, weights, args, kwargs)

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        assert pair.out is not None
        return {"in_proj_weight": weight * pair.delta(), "out_proj.weight": weight * pair.out.delta()}
