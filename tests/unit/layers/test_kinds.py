"""Which modules can carry a pair, and the reasons against."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from luthier.layers.kinds import CONV1D, CONVOLUTION, EMBEDDING, LINEAR, layer_kind, why_hidden, why_not, why_not_folded

PARENT = nn.Module()


def test_kinds_and_sizes() -> None:
    from transformers.pytorch_utils import Conv1D

    convolutions = [(convolution(13, 7, 3), CONVOLUTION) for convolution in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    others = [(nn.Linear(13, 7), LINEAR), (nn.Embedding(13, 7), EMBEDDING), (Conv1D(7, 13), CONV1D)]
    for module, kind in [*convolutions, *others]:
        assert layer_kind(module) is kind
        assert kind.sizes(module) == (13, 7)
        assert why_not(module, PARENT) is None
        assert why_not_folded(module) is None
    for module in (nn.LayerNorm(3), nn.ConvTranspose2d(1, 1, 1), nn.EmbeddingBag(3, 3), nn.Sequential()):
        assert layer_kind(module) is None


def instance_forward() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def integer_weight() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    return layer


def flat_weight() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.weight = nn.Parameter(torch.zeros(15))
    return layer


def own_lora() -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.lora = nn.Linear(3, 1)
    return layer


@pytest.mark.parametrize(
    ("module", "parent", "told"),
    [
        (instance_forward(), PARENT, "forward was replaced on the instance"),
        (integer_weight(), PARENT, "stored as torch.int8"),
        (flat_weight(), PARENT, r"shape \(15,\)"),
        (own_lora(), PARENT, "attribute 'lora' of its own"),
        (parametrizations.orthogonal(nn.Linear(5, 5)), PARENT, "parametrised"),
        (prune.l1_unstructured(nn.Linear(3, 5), "weight", 2), PARENT, "computed from other parameters"),
        (nn.Embedding(3, 5, max_norm=1.0), PARENT, "max_norm"),
        (nn.Embedding(3, 5, sparse=True), PARENT, "sparse"),
        (nn.Linear(4, 4), nn.MultiheadAttention(4, 2), "never calls the layer"),
        (nn.Linear(4, 4), nn.TransformerEncoderLayer(4, 2), "fast path"),
    ],
)
def test_reasons_against_a_pair(module: nn.Module, parent: nn.Module, told: str) -> None:
    assert re.search(told, why_not(module, parent) or "")


def test_only_what_hides_an_adapter_speaks_against_replacing_a_module() -> None:
    assert why_hidden(integer_weight(), PARENT) is None
    assert why_hidden(instance_forward(), PARENT) is not None
    assert why_hidden(nn.Linear(4, 4), nn.MultiheadAttention(4, 2)) is not None


def test_a_forward_of_its_own_makes_folding_inexact() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    class Renamed(nn.Linear):
        pass

    assert "forward of its own" in (why_not_folded(Clipped(3, 5)) or "")
    assert why_not_folded(Renamed(3, 5)) is None
