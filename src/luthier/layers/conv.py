"""LoraConvolution: a convolution over one, two or three axes that carries adapters.

Equation: h = W * x + b + scaling * lora_B * (lora_A * drop(x)), where `*` is the layer's own convolution (stride, padding,
dilation, padding mode) for lora_A and one with a window of size 1 for lora_B. Both together are one convolution with the
weight W + scaling * B A, except with groups (see `kinds.why_not_folded`). DoRA rescales the output channels of both.
"""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from luthier.core.dora import dora_update
from luthier.core.lora import lora_convolution
from luthier.layers.base import AdaptedModule
from luthier.layers.pair import LoraPair


class LoraConvolution(AdaptedModule):
    """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, weight (O, I / groups, K...)."""

    carries_magnitude = True
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def with_pair(self, output: Tensor, x: Tensor, pair: LoraPair, weight: float) -> Tensor:
        x, padding = pair.dropout(x), self.padding
        padded = x
        if self.padding_mode != "zeros":
            padded = F.pad(x, cast(list[int], self._reversed_padding_repeated_twice), mode=self.padding_mode)
            padding = (0,) * len(self.stride)
        low_rank = lora_convolution(
            padded,
            pair.lora_A,
            pair.lora_B,
            weight * pair.scaling if pair.magnitude is None else pair.scaling,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        if pair.magnitude is not None:
            own = cast(Any, self)._conv_forward(x, self.weight, None)
            magnitude, norm = (each.view(-1, *(1 for _ in self.stride)) for each in (pair.magnitude, pair.norm(self.weight)))
            low_rank = weight * dora_update(own, low_rank, magnitude, norm)
        output = output + low_rank.to(output.dtype)
        if (change := pair.bias_change(self.bias)) is not None:
            output = output + (weight * change).view(-1, *(1 for _ in self.stride)).to(output.dtype)
        return output

    def folded_deltas(self, pair: LoraPair, weight: float) -> dict[str, Tensor]:
        deltas = {"weight": weight * pair.update(self.weight)}
        if (change := pair.bias_change(self.bias)) is not None:
            deltas["bias"] = weight * change.detach()
        return deltas
