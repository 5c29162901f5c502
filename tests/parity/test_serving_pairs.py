"""What the engine reads of an adapter that PEFT wrote is what PEFT computes: the pairs, formed densely in float64."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.parity.cases import MakeModel, randomise
from torch import Tensor, nn

from luthier.engine.adapters import AdapterWeights, ServedBase, read_for_serving

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linears": ("llama", {"r": 4, "lora_alpha": 9, "target_modules": LLAMA}),
    "rank one": ("llama", {"r": 1, "lora_alpha": 3, "target_modules": ["down_proj"]}),
    "rslora": ("llama", {"r": 7, "lora_alpha": 11.5, "use_rslora": True, "target_modules": QV}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {r".*\.mlp\..*": 3, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.(q|v)_proj": 32, "up_proj": 1.5},
        },
    ),
    "patterns and rslora": ("llama", {"r": 5, "use_rslora": True, "target_modules": QV, "rank_pattern": {"v_proj": 2}}),
    "one block": ("llama", {"r": 2, "target_modules": LLAMA, "layers_to_transform": 1}),
    "the head": ("llama", {"r": 3, "target_modules": ["lm_head", "q_proj"]}),
    "biases of the base": ("llama-bias", {"r": 3, "target_modules": LLAMA}),
    "qkv in one": ("gpt2", {"r": 5, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "qkv and gate and up in one": ("phi3", {"r": 4, "lora_alpha": 6, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": LLAMA}),
    "dora, rslora and a pattern": (
        "llama-bias",
        {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": LLAMA, "rank_pattern": {"q_proj": 2}},
    ),
    "dora, qkv in one": (
        "gpt2",
        {"r": 5, "lora_alpha": 9, "use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
}
PRUNED = {"init_r": 5, "target_r": 2, "lora_alpha": 10, "total_step": 24, "tinit": 4, "tfinal": 6, "target_modules": LLAMA}


@pytest.fixture
def make_base(make_model: MakeModel) -> MakeModel:
    """Return a factory of `make_model`'s models, and of a Phi 3, which keeps q, k and v in one layer, gate and up in another."""

    def make(name: str) -> nn.Module:
        if name != "phi3":
            return make_model(name)
        from transformers import Phi3Config, Phi3ForCausalLM

        sizes = {"hidden_size": 48, "intermediate_size": 75, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(3)
        return Phi3ForCausalLM(Phi3Config(vocab_size=211, num_key_value_heads=2, pad_token_id=0, **sizes)).eval()

    return make


def written_by_peft(model: nn.Module, config: peft.PeftConfig, dtype: torch.dtype, folder: Path) -> nn.Module:
    """Save an adapter of random numbers with PEFT, its tensors in `dtype`; return PEFT's model with those numbers in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about its own adapters is not what is tested
        live = peft.get_peft_model(model, config)
        randomise(live)
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                if "lora_E" in name:
                    parameter[::2] = 0  # as when it has pruned
                if "lora_" in name:
                    parameter.data = parameter.to(dtype)
        live.eval().save_pretrained(folder)
    return live.double()


def adapted(live: nn.Module) -> dict[str, nn.Module]:
    """Return PEFT's layers by the base's paths."""
    found = {name: module for name, module in live.base_model.model.named_modules() if hasattr(module, "get_delta_weight")}
    assert found, "nothing was adapted: nothing would be compared"
    return found


def change(weights: AdapterWeights, path: str, weight: Tensor) -> Tensor:
    """Return W' - W (O, I) in float64, of what is in memory for one layer; `weight` is (O, I)."""
    if path not in weights.pairs:
        return torch.zeros_like(weight)
    pair = weights.pairs[path]
    assert {pair.A.dtype, pair.B.dtype} == {torch.float32}
    changed = weight + pair.B.double() @ pair.A.double()
    return (changed if pair.magnitude is None else changed * pair.magnitude.double()[:, None]) - weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 file", "bfloat16 file"])
@pytest.mark.parametrize("case", CASES)
def test_the_pairs_of_a_folder_are_what_peft_adds(case: str, dtype: torch.dtype, make_base: MakeModel, tmp_path: Path) -> None:
    name, config = CASES[case]
    live = written_by_peft(make_base(name), peft.LoraConfig(**config), dtype, tmp_path)
    base = make_base(name)
    weights = read_for_serving(tmp_path, ServedBase.of(base))
    layers = adapted(live)
    assert weights.needs_merge is None and set(weights.pairs) == set(layers)
    for path, layer in layers.items():
        weight = base.get_parameter(f"{path}.weight").detach().double()
        is_turned = config.get("fan_in_fan_out", False)
        stored = weight.T if is_turned else weight
        found = change(weights, path, stored)
        wanted = merged_by_peft(layer, weight) if config.get("use_dora") else layer.get_delta_weight("default")
        wanted = wanted.T if is_turned else wanted
        assert wanted.dtype == torch.float64 and wanted.norm() > 1e-3 * stored.norm()
        # Our factors are float32: each is rounded once, whatever PEFT's were.
        assert (found - wanted).norm() <= 2e-7 * (wanted.norm() + stored.norm() * bool(config.get("use_dora")))


def merged_by_peft(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return what PEFT's merge, which knows of DoRA, adds to a weight in float64."""
    layer.merge(adapter_names=["default"])
    return layer.get_base_layer().weight.detach() - weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 file", "bfloat16 file"])
def test_the_pairs_of_adalora_are_what_peft_adds(dtype: torch.dtype, make_base: MakeModel, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(**PRUNED, task_type="CAUSAL_LM")
    live = written_by_peft(make_base("llama"), config, dtype, tmp_path)
    base = make_base("llama")
    weights = read_for_serving(tmp_path, ServedBase.of(base))
    for path, layer in adapted(live).items():
        weight = base.get_parameter(f"{path}.weight").detach().double()
        wanted = layer.get_delta_weight("default")
        assert len(weights.pairs[path].A) == 2, "of its five directions three were pruned"
        assert (change(weights, path, weight) - wanted).norm() <= 5e-6 * wanted.norm()


def test_folders_of_several_adapters_are_told_apart(make_base: MakeModel, tmp_path: Path) -> None:
    """PEFT writes adapters with names of their own into folders of that name, beside the default one."""
    live = peft.get_peft_model(make_base("llama"), peft.LoraConfig(r=2, target_modules=QV))
    live.add_adapter("second", peft.LoraConfig(r=3, target_modules=["down_proj"]))
    live.set_adapter("second")
    randomise(live)
    live.set_adapter("default")
    randomise(live, seed=8)
    live.save_pretrained(tmp_path)
    live.double()
    base = ServedBase.of(make_base("llama"))
    for name, folder in {"default": tmp_path, "second": tmp_path / "second"}.items():
        weights = read_for_serving(folder, base)
        layers = {path: layer for path, layer in adapted(live).items() if name in layer.lora_A}
        assert set(weights.pairs) == set(layers)
        for path, layer in layers.items():
            wanted = layer.get_delta_weight(name)
            assert (change(weights, path, torch.zeros_like(wanted)) - wanted).norm() <= 2e-7 * wanted.norm()
