"""A configuration means the same layers, ranks and scalings here and in PEFT, and one seed gives the same start."""

import warnings
from typing import Any

import hypothesis.strategies as st
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.parity.cases import CASES, IDS_OF_CASES, Case, MakeModel
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.planning import plan
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import LuthierError

Map = dict[str, tuple[int, float]]


def peft_model(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """Attach with PEFT, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**config))


def peft_map(model: nn.Module, config: dict[str, Any]) -> Map:
    """Return path -> (r, scaling) as PEFT sees it."""
    layers = peft_model(model, config).base_model.model.named_modules()
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in layers
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def our_map(model: nn.Module, config: dict[str, Any]) -> Map:
    """Return path -> (r, scaling) as planned here."""
    return {layer.path: (layer.r, layer.scaling) for layer in plan(model, LoraConfig(**config)).layers}


@pytest.mark.parametrize("case", CASES, ids=IDS_OF_CASES)
def test_the_same_layers_ranks_and_scalings(case: Case, make_model: MakeModel) -> None:
    assert our_map(make_model(case.model), case.config) == peft_map(make_model(case.model), case.config)


PARTS = ["q_proj", "k_proj", "self_attn.v_proj", "down_proj", "mlp.up_proj", "layers.1.self_attn.q_proj", "lm_head"]
EXPRESSIONS = [
    *PARTS,
    r".*\.mlp\..*",
    r"layers\.\d+\..*",
    ".*",
    "(q|v)_proj",
    "q_proj|v_proj",
    "model.layers.0.*",
    "embed_tokens",
    "proj",
]


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw settings that interact: overlapping patterns in any order, names, regular expressions, blocks, exclusions."""
    by_name = draw(st.booleans())
    targets = draw(st.lists(st.sampled_from(PARTS), min_size=1, unique=True) if by_name else st.sampled_from(EXPRESSIONS))
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 9)),
        "lora_alpha": draw(st.sampled_from([1, 8, 2.5, 16])),
        "target_modules": targets,
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(st.sampled_from(EXPRESSIONS), st.integers(1, 9), max_size=3)),
        "alpha_pattern": draw(st.dictionaries(st.sampled_from(EXPRESSIONS), st.sampled_from([3, 0.5, 64]), max_size=3)),
        "exclude_modules": draw(st.none() | st.sampled_from(EXPRESSIONS) | st.lists(st.sampled_from(PARTS), max_size=2)),
        "modules_to_save": draw(st.none() | st.lists(st.sampled_from(["lm_head", "layers.0.mlp", "model.norm"]), max_size=2)),
    }
    if by_name and draw(st.booleans()):
        config["layers_to_transform"] = draw(st.integers(0, 1) | st.lists(st.integers(0, 2), max_size=2))
        config["layers_pattern"] = draw(st.sampled_from([None, "layers", ["blocks", "layers"], "blocks"]))
    return config


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_any_config_means_the_same(make_model: MakeModel, config: dict[str, Any]) -> None:
    """Where ours accepts it. What ours refuses (a name without effect, say) PEFT refuses too or takes in silence."""
    try:
        ours = our_map(make_model("llama"), config)
    except LuthierError:
        return
    assert ours == peft_map(make_model("llama"), config)


@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
@pytest.mark.parametrize(
    ("model", "targets"),
    [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"]), ("plain", ["table"]), ("plain", ["first", "table"])],
    ids=["linear", "conv1d", "embedding", "both"],
)
def test_one_seed_gives_the_same_start(model: str, targets: list[str], init: bool | str, make_model: MakeModel) -> None:
    config = {"r": 5, "target_modules": targets, "init_lora_weights": init}
    ours = make_model(model)
    torch.manual_seed(123)
    attach(ours, LoraConfig(**config))
    theirs = make_model(model)
    torch.manual_seed(123)
    theirs = peft_model(theirs, config)
    found = {(item.path, item.role): item.parameter for item in adapter_parameters(ours)}
    expected = {}
    for path, module in theirs.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            for role in ("lora_A", "lora_B"):
                if "default" in getattr(module, role):
                    expected[path, role] = getattr(module, role)["default"].weight
                else:
                    expected[path, role] = getattr(module, role.replace("lora_", "lora_embedding_"))["default"]
    assert found.keys() == expected.keys() and found
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
