"""LoraLinear and LoraConv1D: linear layers that carry adapters.

Equation: h = W x + b + scaling * B A drop(x). The base's own forward runs untouched and the low-rank part is added.
"""

from torch import Tensor

from luthier.core.lora import lora_linear
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair


class LoraLinear(AdaptedModule):
    """`nn.Linear`, weight (O, I)."""

    weight: Tensor
    bias: Tensor | None

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        low_rank = lora_linear(pair.dropout(x), pair.lora_A, pair.lora_B, weight * pair.scaling)
        output = output + low_rank.to(output.dtype)
        if pair.bias is not None and self.bias is not None:
            output = output + (weight * (pair.bias - self.bias)).to(output.dtype)
        return output

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = {"weight": weight * pair.delta()}
        if pair.bias is not None and self.bias is not None:
            deltas["bias"] = weight * (pair.bias.detach() - self.bias.detach())
        return deltas


class LoraConv1D(LoraLinear):
    """transformers' `Conv1D`: a linear layer whose weight is stored (I, O), as in GPT-2."""

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = super().folded_deltas(pair, weight)
        return deltas | {"weight": deltas["weight"].T}
