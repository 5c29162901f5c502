"""LoraLinear and LoraConv1D: linear layers that carry adapters.

Equation: h = W x + b + scaling * B A drop(x). With one live pair over a frozen weight, which is nearly always, all of it is one
node of `luthier.ops`; otherwise the base's own forward runs untouched and the low-rank parts are added.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from luthier.core.lora import lora_linear
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair
from luthier.ops.projection import Projection, adapted_projections


def is_autocast(x: Tensor) -> bool:
    """Return whether torch.autocast would change the dtype of products of `x`."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class LoraLinear(AdaptedModule):
    """`nn.Linear`, weight (O, I)."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        # torch.compile fuses the plain expression itself, and cannot see into a node of ours.
        if len(given) == 1 and self.has_live_pair and not torch.compiler.is_compiling():
            projection = self.projection(given[0])
            if projection is not None:
                return adapted_projections(given[0], [projection])[0]
        return super().forward(*args, **kwargs)

    @property
    def has_live_pair(self) -> bool:
        return any(name in self.lora for name in self.roster.live)

    def projection(self, x: Tensor) -> Projection | None:
        """Return this layer as `luthier.ops` takes it, for an input like `x`; None where only the plain path is right.

        That is: several live pairs, or none of the usual kind (a replacement, a trained bias), a weight that is trained itself,
        autocast, a dtype that is not the weight's, and a base whose forward is not the plain product.
        """
        live = self.roster.live
        names = [name for name in live if name in self.lora]
        if len(names) > 1 or self.base_class.forward is not self._plain_forward() or self.weight.dtype != x.dtype:
            return None
        if any(name in self.replacements for name in live) or is_autocast(x):
            return None
        if self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            return None
        weight_OI = self._weight_OI()
        if not names:
            return Projection(weight_OI, self.bias)
        pair = cast(LoraPair, self.lora[names[0]])
        if pair.bias is not None or pair.lora_bias is not None:
            return None
        scaling = live[names[0]] * pair.scaling
        return Projection(weight_OI, self.bias, *pair.factors(), scaling, pair.live_dropout)

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        low_rank = lora_linear(pair.dropout(x), *pair.factors(), weight * pair.scaling)
        output = output + low_rank.to(output.dtype)
        if (change := pair.bias_change(self.bias)) is not None:
            output = output + (weight * change).to(output.dtype)
        return output

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = {"weight": weight * pair.delta()}
        if (change := pair.bias_change(self.bias)) is not None:
            deltas["bias"] = weight * change.detach()
        return deltas

    def _weight_OI(self) -> Tensor:
        return self.weight

    @staticmethod
    def _plain_forward() -> Any:
        return nn.Linear.forward


class LoraConv1D(LoraLinear):
    """transformers' `Conv1D`: a linear layer whose weight is stored (I, O), as in GPT-2."""

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = super().folded_deltas(pair, weight)
        return deltas | {"weight": deltas["weight"].T}

    def _weight_OI(self) -> Tensor:
        return self.weight.T

    @staticmethod
    def _plain_forward() -> Any:
        from transformers.pytorch_utils import Conv1D

        return Conv1D.forward
