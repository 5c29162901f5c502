"""The LoRA rows of PEFT's own tests on custom models, as cases of ours: which model, which configuration, what must come of it.

The kinds of layers, their sizes and the arguments are those of PEFT (tests/test_custom_models.py, the rows of LoraConfig: 46 in
August 2026, and two with a window of one over three axes that came later). Models and inputs are written anew. Two things
differ on purpose: the inputs are random numbers, since counting ones drive the last softmax flat, and `lora_alpha` is 12 where
PEFT leaves it at r, since a scaling of one hides one that is lost.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.core.config import LoraConfig


class Row(nn.Module):
    """Named layers one after the other, with a bend between them and log-probabilities at the end.

    `shape` is what the input is given before the first layer, `inner` what a layer's output is before the next one.
    """

    def __init__(self, shape: tuple[int, ...] = (), inner: tuple[int, ...] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.names, self.shape, self.inner = tuple(layers), shape, inner
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(self.shape) if self.shape else x
        for name in self.names:
            layer = self.get_submodule(name)
            if name == "last" and x.ndim > 2:
                x = x.flatten(1)
            x = layer(x, x, x)[0] if name == "attention" else layer(x)
            if name == "wide":
                x = x.reshape(self.inner)
            elif name not in ("table", "last", "attention"):
                x = torch.relu(x)
        return F.log_softmax(x, dim=-1)


class OwnProduct(nn.Module):
    """A linear layer that is no `nn.Linear`: a bare weight (I, O) and a bias."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_features, out_features))
        self.bias = nn.Parameter(torch.ones(out_features))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def _drop() -> nn.Module:
    return nn.Dropout(0.5)


@dataclass(frozen=True)
class Model:
    """How a model is made, and the input it is shown."""

    make: Callable[[], nn.Module]
    x: Tensor


MODELS = {
    "mlp": Model(lambda: Row(first=nn.Linear(10, 20), drop=_drop(), last=nn.Linear(20, 2)), _numbers(9, 10)),
    "table": Model(
        lambda: Row(table=nn.Embedding(100, 5), conv1d=Conv1D(1, 5), last=nn.Linear(10, 2)), torch.arange(90).view(9, 10)
    ),
    "line": Model(lambda: Row((-1, 1, 10), conv=nn.Conv1d(1, 1, 2), last=nn.Linear(9, 2)), _numbers(9, 10)),
    "plane": Model(lambda: Row((-1, 5, 3, 3), conv=nn.Conv2d(5, 10, 3), last=nn.Linear(10, 2)), _numbers(9, 10)),
    "plane-8-groups": Model(
        lambda: Row((90,), (2, 16, 3, 3), wide=nn.Linear(90, 288), conv=nn.Conv2d(16, 16, 3, groups=8), last=nn.Linear(16, 2)),
        _numbers(9, 10),
    ),
    "plane-2-groups": Model(
        lambda: Row(conv=nn.Conv2d(16, 32, 3, padding=1, groups=2), last=nn.Linear(12_800, 2)), _numbers(9, 16, 20, 20)
    ),
    "volume": Model(lambda: Row((-1, 5, 3, 3, 3), conv=nn.Conv3d(5, 10, 3), last=nn.Linear(10, 2)), _numbers(9, 10, 3)),
    "volume-window-one": Model(
        lambda: Row((-1, 5, 3, 3, 3), conv=nn.Conv3d(5, 10, 1), last=nn.Linear(270, 2)), _numbers(9, 10, 3)
    ),
    "attention": Model(lambda: Row(attention=nn.MultiheadAttention(10, 2), last=nn.Linear(10, 2)), _numbers(9, 10)),
    "bare": Model(lambda: Row(first=OwnProduct(10, 20), drop=_drop(), last=OwnProduct(20, 2)), _numbers(9, 10)),
}


@dataclass(frozen=True)
class CustomCase:
    """One row. `settings` are the arguments of PEFT's LoraConfig and of ours.

    `merges`: no groups of a convolution stand in the way. `peft`: what PEFT 0.21.2 gets wrong, where the right answer is tested
    instead. `refused`: there is no such adapter here, and what the error names. `reads`: PEFT's folder of it is read all the
    same, since what it holds is plain LoRA.
    """

    name: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    merges: bool = True
    peft: str = ""
    refused: str = ""
    reads: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return {"lora_alpha": 12} | self.settings

    @property
    def x(self) -> Tensor:
        return MODELS[self.model].x

    def base(self) -> nn.Module:
        """Return the base model, in evaluation; the same numbers each time."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = MODELS[self.model].make().eval()
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):  # attention and Conv1D begin at zero, where a lost bias would not show
                    nn.init.normal_(parameter, std=0.5)
            return model


FIRST, LAST, CONV, TABLE = ({"target_modules": [name]} for name in ("first", "last", "conv", "table"))
BOTH, CONV_LAST = {"target_modules": ["first", "last"]}, {"target_modules": ["conv", "last"]}
DORA, BIAS = {"use_dora": True}, {"lora_bias": True, "lora_alpha": 32}
UNMERGED = "cannot merge a window of one over three axes: it forms the update for another shape"
DOUBLED = "adds the output projection's update twice, in the forward and in its merge"
MIXED = "takes DoRA's norm of a matrix whose rows mix the outputs of a group"
PARAMETERS = "" if "target_parameters" in LoraConfig.model_fields else "target_parameters"  # applied as soon as it is a setting
NO_MAGNITUDE = "groups, and PEFT's norm in use_dora is not that of an output"


def _velora(init_type: str) -> dict[str, Any]:
    return {"velora_config": {"num_groups": 2, "init_type": init_type}}


def _bdlora(a: tuple[str, ...] = (), b: tuple[str, ...] = (), **settings: Any) -> dict[str, Any]:
    return BOTH | {"use_bdlora": {"target_modules_bd_a": list(a), "target_modules_bd_b": list(b)} | settings}


CUSTOM_CASES = (
    # A model of two linear layers.
    CustomCase("mlp-expression", "mlp", {"target_modules": "first"}),
    CustomCase("mlp-first", "mlp", FIRST),
    CustomCase("mlp-last", "mlp", LAST),
    CustomCase("mlp-both", "mlp", BOTH),
    CustomCase("mlp-saved-whole", "mlp", FIRST | {"modules_to_save": ["last"]}),
    CustomCase("mlp-dropout", "mlp", FIRST | {"lora_alpha": 4, "lora_dropout": 0.1}),
    CustomCase("mlp-dora", "mlp", FIRST | DORA),
    CustomCase("mlp-dora-both", "mlp", BOTH | DORA),
    CustomCase("mlp-dora-expression", "mlp", {"target_modules": "last", "lora_alpha": 32} | DORA),
    CustomCase("mlp-lora-bias", "mlp", BOTH | BIAS),
    # A table, and transformers' Conv1D, whose weight lies the other way.
    CustomCase("conv1d", "table", {"target_modules": ["conv1d"]}),
    CustomCase("table", "table", TABLE),
    CustomCase("table-and-conv1d", "table", {"target_modules": ["table", "conv1d"]}),
    CustomCase("conv1d-dora", "table", {"target_modules": ["conv1d"]} | DORA),
    CustomCase("table-dora", "table", TABLE | DORA),
    CustomCase("table-and-conv1d-dora", "table", {"target_modules": ["table", "conv1d"]} | DORA),
    CustomCase("conv1d-and-tokens", "table", {"target_modules": ["conv1d"], "trainable_token_indices": {"table": [0, 10]}}),
    # Convolutions over one, two and three axes.
    CustomCase("line", "line", CONV),
    CustomCase("line-dora", "line", CONV | DORA),
    CustomCase("plane", "plane", CONV),
    CustomCase("plane-and-last", "plane", CONV_LAST),
    CustomCase("plane-dora", "plane", CONV | DORA),
    CustomCase("plane-and-last-dora", "plane", CONV_LAST | DORA),
    CustomCase("plane-lora-bias", "plane", CONV | BIAS),
    CustomCase("plane-8-groups", "plane-8-groups", CONV, merges=False),
    CustomCase("plane-2-groups", "plane-2-groups", CONV, merges=False),
    CustomCase("plane-8-groups-dora", "plane-8-groups", CONV | DORA, merges=False, peft=MIXED, refused=NO_MAGNITUDE),
    CustomCase("plane-2-groups-dora", "plane-2-groups", CONV | DORA, merges=False, peft=MIXED, refused=NO_MAGNITUDE),
    CustomCase("volume", "volume", CONV),
    CustomCase("volume-and-last", "volume", CONV_LAST),
    CustomCase("volume-dora", "volume", CONV | DORA),
    CustomCase("volume-and-last-dora", "volume", CONV_LAST | DORA),
    CustomCase("volume-lora-bias", "volume", CONV | BIAS),
    CustomCase("volume-window-one", "volume-window-one", CONV, peft=UNMERGED),
    CustomCase("volume-window-one-dora", "volume-window-one", CONV | DORA, peft=UNMERGED),
    # Attention: both of its projections get a pair.
    CustomCase("attention", "attention", {"target_modules": ["attention"]}, peft=DOUBLED),
    CustomCase("attention-and-last", "attention", {"target_modules": ["attention", "last"]}, peft=DOUBLED),
    # Parameters by their own names. Without `target_modules` luthier means every linear layer, and PEFT none.
    CustomCase("bare-parameter", "bare", {"target_modules": [], "target_parameters": ["first.weight"]}, refused=PARAMETERS),
    CustomCase("parameter-of-a-layer", "mlp", FIRST | {"target_parameters": ["last.weight"]}, refused=PARAMETERS),
    # Methods that are not here: refused by name, and no folder is read as plain LoRA that is not.
    CustomCase("kasa", "mlp", FIRST | {"r": 4, "kasa_config": {}}, refused="kasa_config"),
    CustomCase("mica", "mlp", FIRST | {"r": 4, "init_lora_weights": "mica"}, refused="mica", reads=True),
    CustomCase("velora-random", "mlp", FIRST | _velora("random"), refused="velora_config", reads=True),
    CustomCase("velora-average", "mlp", BOTH | _velora("batch_average"), refused="velora_config", reads=True),
    CustomCase("velora-first-average", "mlp", FIRST | _velora("batch_average_once"), refused="velora_config", reads=True),
    CustomCase("monteclora", "mlp", FIRST | {"monteclora_config": {"num_samples": 2}}, refused="monteclora_config", reads=True),
    CustomCase("bdlora-a", "mlp", _bdlora(a=("first",), match_strict=False), refused="use_bdlora"),
    CustomCase("bdlora-b", "mlp", _bdlora(b=("last",), nblocks=2, match_strict=False), refused="use_bdlora"),
    CustomCase("bdlora-both", "mlp", _bdlora(a=("first",), b=("last",), nblocks=2), refused="use_bdlora"),
)
APPLIED = tuple(case for case in CUSTOM_CASES if not case.refused)
REFUSED = tuple(case for case in CUSTOM_CASES if case.refused)
