"""LoraLinear and LoraConv1D: linear layers that carry adapters.

Equation: h = W x + b + scaling * B A drop(x). With one live pair over a frozen weight, which is nearly always, all of it is one
node of `luthier.ops`; otherwise the base's own forward runs untouched and the low-rank parts are added.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core.dora import dora_update
from luthier.core.lora import lora_linear
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair
from luthier.ops.dora import rescaled
from luthier.ops.projection import Projection, adapted_projections


def is_autocast(x: Tensor) -> bool:
    """Return whether torch.autocast would change the dtype of products of `x`."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


class LoraLinear(AdaptedModule):
    """`nn.Linear`, weight (O, I)."""

    carries_magnitude = True
    weight: Tensor
    bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        # torch.compile fuses the plain expression itself, and cannot see into a node of ours.
        if len(given) == 1 and self.has_live_pair and not torch.compiler.is_compiling():
            projection = self.projection(given[0])
            if projection is not None:
                return self.finished(adapted_projections(given[0], [projection])[0])
        return super().forward(*args, **kwargs)

    @property
    def has_live_pair(self) -> bool:
        return any(name in self.lora for name in self.roster.live)

    def projection(self, x: Tensor) -> Projection | None:
        """Return this layer as `luthier.ops` takes it, for an input like `x`; None where only the plain path is right.

        That is: several live pairs, or none of the usual kind (a replacement, a trained bias, DoRA with dropout or at another
        than its trained strength), a weight that is trained itself, autocast, a dtype that is not the weight's, and a base whose
        forward is not the plain product. What the projection gives goes through `finished`.
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
        if pair.magnitude is not None and (pair.live_dropout or live[names[0]] != 1.0):
            return None
        scaling = live[names[0]] * pair.scaling
        return Projection(weight_OI, self.bias, *pair.factors(), scaling, pair.live_dropout)

    @property
    def has_live_magnitude(self) -> bool:
        return any(name in self.lora and self.lora[name].magnitude is not None for name in self.roster.live)

    def finished(self, output: Tensor) -> Tensor:
        """Return the layer's output (..., O), given what its `projection` gave: DoRA's magnitude is still to be applied."""
        for name in self.roster.live:
            if name in self.lora:
                pair = cast(LoraPair, self.lora[name])
                if pair.magnitude is not None:
                    output = rescaled(output, pair.magnitude, pair.norm(self._weight_OI()), self.bias)
        return output

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        dropped = pair.dropout(x)
        if pair.magnitude is None:
            update = lora_linear(dropped, *pair.factors(), weight * pair.scaling)
        else:
            weight_OI, low_rank = self._weight_OI(), lora_linear(dropped, *pair.factors(), pair.scaling)
            update = weight * dora_update(F.linear(dropped, weight_OI), low_rank, pair.magnitude, pair.norm(weight_OI))
        output = output + update.to(output.dtype)
        if (change := pair.bias_change(self.bias)) is not None:
            output = output + (weight * change).to(output.dtype)
        return output

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = {"weight": weight * pair.update(self._weight_OI())}
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
