"""target_parameters: which parameters are meant, what is counted, and what is refused with all faults at once."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import adapter_parameters, attach, detach, plan
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError, TargetError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


class Holder(nn.Module):
    """Parameters of 1 to 4 axes, some of which are not numbers to learn, and a layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Parameter(torch.randn(*(3,) * axes)) for axes in (1, 2, 3))
        self.four = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.whole = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
        self.small = nn.Parameter(torch.zeros(3, 3).to(torch.float8_e4m3fn), requires_grad=False)
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.two)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(3, 3))
        self.holder, self.table, self.line = Holder(), nn.Embedding(5, 3), nn.Linear(3, 3)
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(3, 3))])
        self.recurrent = nn.LSTM(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(self.holder(x) @ self.own)


def params_only(*targets: str, **others: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": [], "target_parameters": list(targets)} | others))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_the_plan_counts_what_attaching_makes(tiny_moe: Callable[..., nn.Module], model_type: str) -> None:
    model = tiny_moe(model_type)
    size = sum(parameter.numel() for parameter in model.parameters())
    config = params_only(*EXPERTS, rank_pattern={"down_proj": 1, "experts.gate_up_proj": 3})
    planned = plan(model, config)
    assert attach(model, config) == planned
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # Two layers of 5 experts, 16 -> 48 at r=3 and 24 -> 16 at r=1.
    assert planned.num_parameters == trained == 2 * 5 * (3 * (16 + 48) + 1 * (24 + 16))
    assert planned.num_base_parameters == size
    assert "2 x experts.gate_up_proj 16 -> 48, r=3 for each of 5 experts: 960 each" in str(planned)
    for item in adapter_parameters(model):
        layer = next(layer for layer in planned.layers if (layer.path, layer.parameter) == (item.path, item.key))
        assert tuple(item.parameter.shape) == layer.shapes[item.role]
    detach(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_names_mean_the_ends_of_paths_and_each_adapter_has_its_own(tiny_moe: Callable[..., nn.Module]) -> None:
    model = tiny_moe("mixtral")
    found = {layer.name for layer in plan(model, params_only("down_proj", "layers.1.mlp.gate.weight")).layers}
    assert found == {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.mlp.gate.weight",
    }
    attach(model, params_only("down_proj"), "a")
    attach(model, params_only("gate_up_proj", "q_proj.weight"), "b")
    attach(model, LoraConfig(target_modules=["q_proj"]), "c")
    assert {item.key for item in adapter_parameters(model, "a")} == {"down_proj"}
    assert {item.path.rpartition(".")[2] for item in adapter_parameters(model, "b")} == {"experts", "q_proj"}


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("own", "belongs to the model itself"),
        ("holder.one", r"shape \(3,\); only matrices and stacks"),
        ("holder.four", r"shape \(3, 3, 3, 3\)"),
        ("holder.whole", "stored as torch.int8"),
        ("holder.small", "stored as torch.float8_e4m3fn"),
        ("table.weight", "name the embedding in target_modules"),
        ("matrices.0", "a ParameterList is never called"),
        ("weight_ih_l0", "a LSTM reads its weights from a list of its own"),
        ("holder.tow", "matches nothing. Did you mean 'holder.two'"),
        ("line", "It is a module: name it in target_modules"),
        ("lin", "matches nothing"),
    ],
)
def test_what_cannot_be_adapted_is_refused_by_name(target: str, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        plan(Model(), params_only(target))


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"target_modules": ["line"], "target_parameters": ["line.weight"]}, "target_modules adapts line too"),
        ({"target_modules": "all-linear", "target_parameters": ["line.weight"]}, "target_modules adapts line too"),
        ({"modules_to_save": ["holder"], "target_parameters": ["holder.two"]}, "modules_to_save replaces"),
        ({"target_modules": ["inner"], "target_parameters": ["holder.two"]}, "holder.inner lies in holder"),
        ({"modules_to_save": ["inner"], "target_parameters": ["holder.two"]}, "holder.inner lies in holder"),
        ({"init_lora_weights": "pissa", "target_parameters": ["holder.two"]}, "init 'pissa' is for linear layers"),
        ({"init_lora_weights": "eva", "target_parameters": ["holder.two"]}, "init 'eva' is for linear layers"),
    ],
)
def test_what_does_not_go_together_is_refused(others: dict[str, Any], told: str) -> None:
    with pytest.raises(TargetError, match=told):
        plan(Model(), params_only(**others))


def test_all_faults_are_told_at_once_and_nothing_is_touched() -> None:
    model = Model()
    with pytest.raises(TargetError, match=r"\(4 faults\)") as raised:
        attach(model, LoraConfig(target_modules=["nothing here"], target_parameters=["nowhere", "holder.one", "holder.four"]))
    assert all(text in str(raised.value) for text in ("nowhere", "holder.one", "holder.four", "nothing here"))
    assert type(model.holder) is Holder and all(parameter.requires_grad for parameter in (model.own, model.holder.two))


def test_a_layer_is_adapted_as_a_layer_or_by_its_parameters_not_both() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"line": Scaled(3, 3)})
    attach(model, LoraConfig(target_modules=["line"]), "layer")
    with pytest.raises(TargetError, match=r"another adapter adapts the layer itself \(target_modules\)"):
        attach(model, params_only("line.weight"), "parameter")
    detach(model)
    attach(model, params_only("line.weight"), "parameter")
    with pytest.raises(TargetError, match=r"another adapter adapts its parameters themselves \(target_parameters\)"):
        attach(model, LoraConfig(target_modules=["line"]), "layer")


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ({"lora_dropout": 0.1, "lora_bias": True, "bias": "all"}, ["lora_dropout", "lora_bias", "bias='all'"]),
        ({"use_dora": True, "bias": "lora_only"}, ["use_dora", "bias='lora_only'"]),
    ],
)
def test_settings_that_a_parameter_has_no_place_for_are_told_at_once(others: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        params_only("holder.two", **others)
    assert all(word in str(raised.value) for word in told)


def test_adalora_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_parameters cannot be adapted by AdaLoRA"):
        AdaLoraConfig(target_modules=[], target_parameters=["holder.two"])


def test_settings_without_effect_are_told() -> None:
    config = {"target_modules": ["q_proj"], "alpha_pattern": {"holder": 3}, "rank_pattern": {"holder.two": 1}}
    planned = plan(Model(), params_only("two", "three", **(config | {"target_modules": ["line"], "layers_to_transform": [0]})))
    told = "\n".join(planned.warnings)
    assert "alpha_pattern key 'holder' matches no adapted layer" in told and "rank_pattern" not in told
    assert "layers_to_transform do not choose among target_parameters" in told


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
def test_each_expert_begins_as_a_layer_of_its_size_would(init: bool | str, is_transposed: bool) -> None:
    """A uniform within 1 / sqrt(in), or normal with deviation 1 / r whatever the number of experts; B zero, or uniform."""
    model = nn.ModuleDict({"holder": Holder()})
    model["holder"].three = nn.Parameter(torch.randn(16, 50, 40))
    model["holder"].is_transposed = is_transposed
    attach(model, params_only("three", r=4, init_lora_weights=init))
    pair = {item.role: item.parameter.detach() for item in adapter_parameters(model)}
    width = 50 if is_transposed else 40
    assert pair["lora_A"].shape == (64, width) and pair["lora_B"].shape == (90 - width, 64)
    if init == "gaussian":
        assert float(pair["lora_A"].std()) == pytest.approx(1 / 4, rel=0.05)
    else:
        assert 0.95 / math.sqrt(width) < float(pair["lora_A"].abs().max()) <= 1 / math.sqrt(width)
    assert bool(pair["lora_B"].any()) is (init is False)
