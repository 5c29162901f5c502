"""Methods freely combined: magnitude, scaling and start of a pair do not know each other. Each mix against dense float64."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import fuse
from luthier.adapt.merging import merge, unmerge
from luthier.adapt.state import adapter_parameters, base_parameters
from luthier.core.config import LoraConfig
from luthier.formats.adapters import load_adapter, save_adapter

INITS = [True, "gaussian", "orthogonal", "olora", "pissa"]
MIXES = [
    {"init_lora_weights": init, "use_rslora": rslora, "use_dora": dora}
    for init, rslora, dora in itertools.product(INITS, [False, True], [False, True])
]
SIZE = {"r": 6, "lora_alpha": 9, "target_modules": "all-linear", "rank_pattern": {"q_proj|c_attn": 4}}
each_mix = pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "-".join(map(str, mix.values())))
Make = Callable[..., nn.Module]


def learn(model: nn.Module) -> None:
    """Move every trained number, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.mul_(1 + 0.1 * torch.randn(item.parameter.shape, generator=draw))
            item.parameter.add_(0.05 * torch.randn(item.parameter.shape, generator=draw))


def dense_weights(base: nn.Module, adapted: nn.Module, use_rslora: bool) -> dict[str, Tensor]:
    """Return path -> W' (O, I) in float64 of every adapted layer, from the numbers alone: m (W + D) / ||W + D||, or W + D."""
    numbers = {name: tensor.double() for name, tensor in adapted.state_dict().items()}
    dense = {}
    for path, module in base.named_modules():
        if (A := numbers.get(f"{path}.lora.default.lora_A")) is None:
            continue
        B, r = numbers[f"{path}.lora.default.lora_B"], A.shape[0]
        delta = B @ A
        if (A0 := numbers.get(f"{path}.lora.default.start_A")) is not None:
            delta = delta - numbers[f"{path}.lora.default.start_B"] @ A0
        own = module.weight.detach().double()
        weight = (own.T if "Conv1D" in type(module).__name__ else own) + delta * 9 / (r**0.5 if use_rslora else r)
        if (m := numbers.get(f"{path}.lora.default.magnitude")) is not None:
            weight = m[:, None] * weight / weight.norm(dim=1, keepdim=True)
        dense[path] = weight
    return dense


def dense_logits(base: nn.Module, dense: dict[str, Tensor], ids: Tensor) -> Tensor:
    model = copy.deepcopy(base).double()
    with torch.no_grad():
        for path, weight in dense.items():
            module = model.get_submodule(path)
            module.weight.copy_(weight.T if "Conv1D" in type(module).__name__ else weight)
    return model(ids).logits.detach()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@each_mix
@pytest.mark.parametrize("make", ["tiny_llama", "tiny_gpt2"])
def test_a_mix_is_the_dense_expression_live_merged_and_from_its_folder(
    mix: dict, make: str, ids: Tensor, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(make)()
    base, before = copy.deepcopy(model), model(ids).logits
    attach(model, LoraConfig(**SIZE, **mix))
    assert torch.equal(model(ids).logits, before), "a fresh adapter changes nothing"
    learn(model)
    dense = dense_weights(base, model, mix["use_rslora"])
    expected = dense_logits(base, dense, ids)
    live = model(ids).logits.detach()
    assert relative(live, expected) <= 2e-5
    assert relative(before.detach(), expected) > 1e-2, "nothing was learnt: nothing was compared"

    save_adapter(model, tmp_path / "saved")
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "saved")
    assert relative(again(ids).logits.detach(), expected) <= 2e-5

    originals = {name: tensor.clone() for name, tensor in base_parameters(model)}
    merge(model)
    for path, weight in dense.items():
        module = model.get_submodule(path)
        merged = module.weight.T if "Conv1D" in type(module).__name__ else module.weight
        assert relative(merged.detach(), weight) <= 1e-6
    unmerge(model)
    assert all(torch.equal(tensor, originals[name]) for name, tensor in base_parameters(model))


@each_mix
def test_gradients_of_a_mix_are_the_dense_ones_fused_and_not(mix: dict, tiny_llama: Make, ids: Tensor) -> None:
    model = tiny_llama(dtype=torch.float64)
    base = copy.deepcopy(model).requires_grad_(False)
    attach(model, LoraConfig(**SIZE, **mix))
    model.double()
    learn(model)
    items = list(adapter_parameters(model))

    # torch's own gradients of the dense expression; n is held still, as DoRA's section 4.3 has it.
    leaves = {(item.path, item.role): item.parameter.detach().clone().requires_grad_() for item in items}
    weights = {}
    for path in {item.path for item in items}:
        pair, W = model.get_submodule(path).lora["default"], base.get_submodule(path).weight
        delta = leaves[path, "lora_B"] @ leaves[path, "lora_A"]
        weight = W + pair.scaling * (delta - pair.start_B @ pair.start_A if pair.has_start else delta)
        if mix["use_dora"]:
            weight = leaves[path, "magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
        weights[f"{path}.weight"] = weight
    logits = torch.func.functional_call(base, weights, (ids,), {"use_cache": False}).logits
    wanted = torch.autograd.grad(logits.square().mean(), list(leaves.values()))

    for is_fused in (False, True):
        if is_fused:
            assert fuse(model).attentions
        loss = model(ids, use_cache=False).logits.square().mean()
        found = torch.autograd.grad(loss, [item.parameter for item in items])
        for item, each, want in zip(items, found, wanted, strict=True):
            # The model forms its own norms in float32 whatever it is in; fused ones are not.
            assert (each - want).norm() <= 1e-6 * want.norm(), (item.path, item.role, is_fused)
