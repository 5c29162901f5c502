"""target_parameters on mixtures of experts: dense float64 models as the oracle, and folders that travel to PEFT and back."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.parity.cases import IDS, logits, randomise, relative
from torch import Tensor, nn

from luthier.adapt import activate, adapter_parameters, attach, merge, unmerge
from luthier.core.config import LoraConfig
from luthier.formats.adapters import load_adapter, save_adapter, swap_adapter

MakeMoe = Callable[..., nn.Module]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {
    "mixtral": [*EXPERTS, "gate.weight"],
    "qwen3_moe": [*EXPERTS, "mlp.gate.weight"],
    "gpt_oss": [*EXPERTS, "router.weight"],
    "llama4_text": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj", "router.weight"],
}
IMPLEMENTATIONS = [(name, how) for name in list(TARGETS)[:3] for how in ("grouped_mm", "batched_mm")]
each_model = pytest.mark.parametrize("model_type", TARGETS)


def settings(model_type: str, **others: Any) -> dict[str, Any]:
    """Ranks and alphas differ from parameter to parameter, and an ordinary layer is adapted beside them."""
    return {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["q_proj"],
        "target_parameters": TARGETS[model_type],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r"layers\.1\..*gate_up_proj": 4},
    } | others


def get_peft(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about its own adapters is not what is tested
        return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def from_peft(model: nn.Module, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.PeftModel.from_pretrained(model, folder).eval()
        result = live.load_adapter(folder, "default")
    assert not result.missing_keys and not result.unexpected_keys
    return live


def dense_twin(base: nn.Module, adapted: nn.Module, name: str = "default", weight: float = 1.0) -> nn.Module:
    """Return a float64 copy of `base` into which the adapter's updates are written, expert by expert.

    Which axis is called in and which out does not matter to a product, so only the stored shape is asked: a stack (E, M, N) gets
    B_e A_e where A has N columns, and its transpose where the module says that it is stored the other way round.
    """
    twin = copy.deepcopy(base).double()
    twin.config._experts_implementation = "eager"  # the grouped product takes no float64
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for item in adapter_parameters(adapted, name):
        found.setdefault((item.path, item.key), {})[item.role] = item.parameter.detach().double()
    with torch.no_grad():
        for (path, key), pair in found.items():
            full = f"{path}.{key or 'weight'}"
            parameter, r, alpha = twin.get_parameter(full), 3, 7
            if full.endswith("experts.down_proj"):
                r = 2
            if full.endswith("gate_up_proj") and ".layers.1." in full:
                alpha = 4
            A, B = pair["lora_A"], pair["lora_B"]
            experts = parameter.shape[0] if parameter.ndim == 3 else 1
            assert len(A) == r * experts
            for e in range(experts):
                update = sum(torch.outer(B[:, k * experts + e], A[e * r + k]) for k in range(r))
                update = update.T if getattr(twin.get_submodule(path), "is_transposed", False) else update
                (parameter[e] if parameter.ndim == 3 else parameter).add_(weight * alpha / r * update)
    return twin


@pytest.mark.parametrize(("model_type", "experts"), [*((name, "eager") for name in TARGETS), *IMPLEMENTATIONS])
def test_the_model_is_the_dense_one_and_a_fresh_adapter_the_base(tiny_moe: MakeMoe, model_type: str, experts: str) -> None:
    base, model = tiny_moe(model_type, experts=experts), tiny_moe(model_type, experts=experts)
    names = list(model.state_dict())
    attach(model, LoraConfig(**settings(model_type)))
    assert torch.equal(logits(model), logits(base))
    assert [name for name in model.state_dict() if ".lora." not in name] == names
    randomise(model)
    want = logits(dense_twin(base, model))
    assert relative(logits(model), want) < 1e-5 < 1e-2 < relative(logits(base), want)
    unmerged = logits(model)
    merge(model)
    assert relative(logits(model), want) < 1e-5
    unmerge(model)
    assert torch.equal(logits(model), unmerged)


@each_model
def test_gradients_are_those_of_the_dense_model(tiny_moe: MakeMoe, model_type: str) -> None:
    base, model = tiny_moe(model_type), tiny_moe(model_type)
    attach(model, LoraConfig(**settings(model_type)))
    randomise(model)
    twin = dense_twin(base, model).requires_grad_(True)
    for either in (model, twin):
        either(IDS).logits.square().mean().backward()
    pairs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for item in adapter_parameters(model):
        if item.key == "gate_up_proj":
            pairs.setdefault((item.path, item.key), {})[item.role] = item.parameter
    assert len(pairs) == 2
    for (path, key), pair in pairs.items():
        G, scaling = twin.get_parameter(f"{path}.{key}").grad, (4 if ".layers.1." in path else 7) / 3
        G = G.mT if getattr(twin.get_submodule(path), "is_transposed", False) else G
        for e in range(5):
            A, B = pair["lora_A"][3 * e : 3 * e + 3].detach().double(), pair["lora_B"][:, e::5].detach().double()
            # An expert that got no token has none.
            close = {"rtol": 1e-4, "atol": 1e-4 * float(G.abs().max())}
            torch.testing.assert_close(pair["lora_A"].grad[3 * e : 3 * e + 3].double(), scaling * B.T @ G[e], **close)
            torch.testing.assert_close(pair["lora_B"].grad[:, e::5].double(), scaling * G[e] @ A.T, **close)
        assert pair["lora_A"].grad.any() and pair["lora_B"].grad.any()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".lora." not in name)


@each_model
def test_peft_written_loads_in_ours_and_goes_back_bit_equal(tiny_moe: MakeMoe, model_type: str, tmp_path: Path) -> None:
    live = get_peft(tiny_moe(model_type), settings(model_type))
    randomise(live)
    live.save_pretrained(tmp_path / "peft")
    model = tiny_moe(model_type)
    load_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert len(one) == 2 * 2 * 4 and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert relative(logits(model), logits(live)) < 1e-5
    assert relative(logits(tiny_moe(model_type)), logits(model)) > 1e-2


@each_model
def test_ours_loads_in_peft(tiny_moe: MakeMoe, model_type: str, tmp_path: Path) -> None:
    model = tiny_moe(model_type)
    attach(model, LoraConfig(**settings(model_type, use_rslora=True)))
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    assert relative(logits(from_peft(tiny_moe(model_type), tmp_path / "ours")), logits(model)) < 1e-5


@each_model
@pytest.mark.parametrize("init", [True, "gaussian", False], ids=str)
def test_one_seed_gives_the_same_start_in_both(tiny_moe: MakeMoe, model_type: str, init: bool | str, tmp_path: Path) -> None:
    config = settings(model_type, init_lora_weights=init)
    ours, theirs = tiny_moe(model_type), tiny_moe(model_type)
    torch.manual_seed(123)
    attach(ours, LoraConfig(**config))
    torch.manual_seed(123)
    get_peft(theirs, config).save_pretrained(tmp_path / "peft")
    save_adapter(ours, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert one.keys() == other.keys() and [key for key in one if not torch.equal(one[key], other[key])] == []


def test_several_adapters_and_a_swap_in_the_place_of_one(tiny_moe: MakeMoe, tmp_path: Path) -> None:
    base, model = tiny_moe("mixtral"), tiny_moe("mixtral")
    attach(model, LoraConfig(**settings("mixtral")), "a")
    attach(model, LoraConfig(**settings("mixtral", target_parameters=EXPERTS[:1])), "b")
    randomise(model)
    activate(model, ["a", "b"])
    want = logits(dense_twin(dense_twin(base, model, "a"), model, "b"))
    assert relative(logits(model), want) < 1e-5
    save_adapter(model, tmp_path / "b", "b")
    swap_adapter(model, tmp_path / "b", "a")
    assert relative(logits(model), logits(dense_twin(dense_twin(base, model, "b"), model, "b"))) < 1e-5
    activate(model, "a")
    alone = tiny_moe("mixtral")
    load_adapter(alone, tmp_path / "b")
    assert torch.equal(logits(model), logits(alone))


class Block(nn.Module):
    """A matrix in a module of its own, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(5, 12), Mix(), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.mix(self.first(x))))


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(9, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T


@pytest.mark.parametrize("written_by", ["peft", "luthier"])
def test_a_matrix_and_a_linear_layer_s_weight_travel_both_ways(written_by: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    base, x = Block().eval(), torch.randn(4, 5)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["last"], "target_parameters": ["mix.matrix", "first.weight"]}
    one, other = copy.deepcopy(base), copy.deepcopy(base)
    if written_by == "peft":
        one = get_peft(one, config)
        randomise(one)
        one.save_pretrained(tmp_path)
        load_adapter(other, tmp_path)
    else:
        attach(one, LoraConfig(**config))
        randomise(one)
        save_adapter(one, tmp_path)
        other = from_peft(other, tmp_path)
    assert relative(logits(other, x), logits(one, x)) < 1e-5 < 1e-2 < relative(logits(base, x), logits(one, x))
