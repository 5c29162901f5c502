"""One layer of each kind, base and adapter, with the dense float64 algebra that says what it must compute."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import attach
from luthier.core.config import LoraConfig
from luthier.layers.pair import LoraPair


@dataclass
class Case:
    """An adapted layer, and its numbers as plain float64 tensors: weight and bias as a linear layer has them, (O, I) and (O,)."""

    kind: str
    layer: nn.Module
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scaling: float

    @property
    def pair(self) -> LoraPair:
        return self.layer.lora["a"]

    @property
    def delta(self) -> Tensor:
        """scaling * B A in float64."""
        return self.scaling * self.pair.lora_B.detach().double() @ self.pair.lora_A.detach().double()

    def dense(self, weight: Tensor) -> Tensor:
        """The layer's output in float64, if its weight were this."""
        if self.kind == "embedding":
            return weight.T[self.x]
        y = self.x.double() @ weight.T
        return y if self.bias is None else y + self.bias

    def want(self) -> Tensor:
        return self.dense(self.weight + self.delta)


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Layers this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Return a factory of adapted layers with random numbers in both factors, unless `fresh`."""
    from transformers.pytorch_utils import Conv1D

    def make(
        kind: str,
        *,
        sizes: tuple[int, int] = (13, 7),
        leading: tuple[int, ...] = (2, 5),
        r: int = 4,
        lora_alpha: float = 6,
        use_rslora: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        use_dora: bool = False,
        fresh: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Case:
        in_features, out_features = sizes
        layer: nn.Module
        if kind == "linear":
            layer, x = nn.Linear(in_features, out_features, bias=bias), torch.randn(*leading, in_features)
        elif kind == "conv1d":
            layer, x = Conv1D(out_features, in_features), torch.randn(*leading, in_features)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
        else:
            layer, x = nn.Embedding(in_features, out_features), torch.randint(in_features, leading)
        layer = layer.to(dtype).eval()
        weight = layer.weight.detach().double()
        own_bias = getattr(layer, "bias", None)
        holder = nn.ModuleDict({"layer": layer})
        settings = {"r": r, "lora_alpha": lora_alpha, "use_rslora": use_rslora, "lora_dropout": dropout, "use_dora": use_dora}
        attach(holder, LoraConfig(target_modules=["layer"], **settings), "a")
        for factor in () if fresh else (layer.lora["a"].lora_A, layer.lora["a"].lora_B):
            nn.init.normal_(factor)
        return Case(
            kind,
            layer,
            x.to(dtype) if x.is_floating_point() else x,
            weight if kind == "linear" else weight.T,
            None if own_bias is None else own_bias.detach().double(),
            lora_alpha / (r**0.5 if use_rslora else r),
        )

    return make
