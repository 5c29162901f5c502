"""LoraConvolution: a convolution over one, two or three axes that carries adapters.

Equation: h = W * x + b + scaling * lora_B * (lora_A * drop(x)), where `*` is the layer's own convolution (stride, padding,
dilation, padding mode) for lora_A and one with a window of size 1 for lora_B. Both together are one convolution with the
weight W + scaling * B A, except with groups (see `kinds.why_not_folded`).
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from luthier.core.lora import lora_convolution
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair


class LoraConvolution(AdaptedModule):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, weight (O, I / groups, K...)."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        x, padding = pair.dropout(x), self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, cast(list[int], self._reversed_padding_repeated_twice), mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        low_rank = lora_convolution(
            x,
            pair.lora_A,
            pair.lora_B,
            weight * pair.scaling,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        output = output + low_rank.to(output.dtype)
        if (change := pair.bias_change(self.bias)) is not None:
            output = output + (weight * change).view(-1, *(1 for _ in self.stride)).to(output.dtype)
        return output

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = {"weight": weight * pair.delta()}
        if (change := pair.bias_change(self.bias)) is not None:
            deltas["bias"] = weight * change.detach()
        return deltas
