"""adapter_spectra(): every number against dense float64 algebra on the same folder and base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.cases import Convolutions, Plain
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.merging import merge
from luthier.adapt.packing import quantize_linears
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.formats.adapters import save_adapter
from luthier.formats.folder import read_adapter
from luthier.inspect import AdapterSpectra, adapter_spectra


def trained(model: nn.Module, config: LoraConfig, size: float = 0.3) -> nn.Module:
    """Attach an adapter and move its numbers, as training would."""
    attach(model, config)
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.add_(torch.randn(item.parameter.shape) * size)
    return model


def measured(model: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None, **settings: Any) -> AdapterSpectra:
    return adapter_spectra(read_adapter(save_adapter(model, folder)), weights and weights.get, **settings)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def dense(model: nn.Module, path: str) -> Tensor:
    pair = model.get_submodule(path).lora["default"]
    if hasattr(pair, "lora_E"):
        return (pair.scaling * pair.lora_B.double() @ torch.diag(pair.lora_E.double().view(-1)) @ pair.lora_A.double()).detach()
    A, B = (factor.detach().double().flatten(1) for factor in pair.factors())
    return pair.scaling * B @ A


KINDS: dict[str, tuple[Callable[[], nn.Module], LoraConfig]] = {
    "linear and embedding": (Plain, LoraConfig(r=5, lora_alpha=3, use_rslora=True, target_modules=["table", "first", "second"])),
    "rank pattern": (Plain, LoraConfig(r=5, target_modules=["table", "first"], rank_pattern={"first": 2})),
    "convolutions": (Convolutions, LoraConfig(r=4, target_modules=["line", "plane", "volume"])),
    "adalora": (Plain, AdaLoraConfig(init_r=4, target_r=3, target_modules=["first", "second"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_spectrum_is_that_of_the_dense_update(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    base = make()
    weights = weights_of(base)
    model = trained(base, config)
    found = measured(model, tmp_path / "a", weights, share=0.8)
    assert found.layers
    for layer in found.layers:
        update = dense(model, layer.path)
        S = torch.linalg.svdvals(update)[: len(layer.singular_values)]
        assert layer.shape == tuple(update.shape)
        torch.testing.assert_close(torch.tensor(layer.singular_values, dtype=torch.float64), S, rtol=1e-10, atol=1e-12)
        assert layer.delta_norm == pytest.approx(torch.linalg.matrix_norm(update).item(), rel=1e-12)
        held = S.square().cumsum(0) / S.square().sum()
        assert layer.energy == pytest.approx(held.tolist())
        assert layer.suggested_rank == next(r for r, share in enumerate(held.tolist(), 1) if share >= 0.8)
        assert layer.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2))
        p = S / S.sum()
        assert layer.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()))
        assert layer.numerical_rank == torch.linalg.matrix_rank(update, rtol=1e-10)
        weight = weights[f"{layer.path}.weight"].double()
        assert layer.base is not None
        assert layer.base.weight_norm == pytest.approx(weight.norm().item())
        assert layer.base.share == pytest.approx((update.norm() / weight.norm()).item())
    json.dumps(found.as_dict())


def test_the_noise_floor_is_the_error_of_a_real_merge(tmp_path: Path) -> None:
    sizes = (3e-3, 1e-3, 3e-4, 1e-5, 3e-6)  # of the singular values, from well above the rounding to far below it
    model = nn.ModuleDict({"layer": nn.Linear(96, 80, bias=False).bfloat16()})
    weights = weights_of(model)
    attach(model, LoraConfig(r=5, lora_alpha=5, target_modules=["layer"]))
    U, V = (torch.linalg.qr(torch.randn(size, 5)).Q for size in (80, 96))
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.copy_(V.T if item.role == "lora_A" else U * torch.tensor(sizes) * 30)
    (layer,) = measured(model, tmp_path / "a", weights).layers
    update = dense(model, "layer")
    merge(model)
    error = model["layer"].weight.detach().double() - weights["layer.weight"].double() - update
    S = torch.linalg.svdvals(error)
    assert layer.base is not None and layer.base.noise_floor is not None
    assert layer.base.rounded_away == pytest.approx((error.norm() / update.norm()).item(), rel=1e-4)
    assert 0.95 * S[0] < layer.base.noise_floor <= S[0] * (1 + 1e-5)
    assert layer.base.above_floor == sum(value > layer.base.noise_floor for value in layer.singular_values)
    assert 0 < layer.base.above_floor < 5
    # What is above the floor is found again in the merged weight, what is below is not.
    stored = torch.linalg.svd(update + error)
    again = [float((U[:, i].double() @ stored.U[:, : layer.base.above_floor]).norm()) for i in range(5)]
    assert min(again[: layer.base.above_floor]) > 0.7 > 0.3 > max(again[3:])


def test_an_update_below_the_last_digit_is_rounded_away_whole(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(32, 32, bias=False).bfloat16()})
    with torch.no_grad():
        model["layer"].weight.copy_(1 + torch.rand(32, 32))
    weights = weights_of(model)
    found = measured(trained(model, LoraConfig(r=2, target_modules=["layer"]), size=1e-3), tmp_path / "a", weights)
    layer = found.layers[0].base
    assert layer is not None and layer.noise_floor is not None
    assert layer.rounded_away == pytest.approx(1, rel=1e-3)
    assert layer.noise_floor == pytest.approx(found.layers[0].singular_values[0], rel=1e-3)
    assert layer.above_floor in (0, 1)  # the floor is the first value itself, but for rounding


def test_dora_is_measured_whole_beside_its_base(tmp_path: Path) -> None:
    base = Plain()
    weights = weights_of(base)
    model = trained(base, LoraConfig(r=3, use_dora=True, target_modules=["first", "table"]), size=0.1)
    found = measured(model, tmp_path / "a", weights)
    assert any("DoRA" in remark for remark in found.remarks)
    for layer in found.layers:
        weight = weights[f"{layer.path}.weight"].double()
        weight = weight.T if layer.path == "table" else weight
        magnitude = model.get_submodule(layer.path).lora["default"].magnitude.detach().double()
        moved = weight + dense(model, layer.path)
        whole = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
        assert layer.base is not None and layer.base.magnitude_change is not None
        assert layer.base.change_norm == pytest.approx(torch.linalg.matrix_norm(whole - weight).item(), rel=1e-6)
        assert layer.delta_norm == pytest.approx(torch.linalg.matrix_norm(moved - weight).item(), rel=1e-9)
        changes = magnitude / weight.norm(dim=1) - 1
        assert layer.base.magnitude_change == pytest.approx(changes.square().mean().sqrt().item(), rel=1e-6)
        change, start = whole - weight, weight.bfloat16().double()
        error = (start + change).bfloat16().double() - start - change
        # The merge that is tried begins at the weight in bfloat16, whose own rounding turns the update a little.
        assert layer.base.rounded_away == pytest.approx((error.norm() / change.norm()).item(), rel=0.1)
    without = adapter_spectra(read_adapter(tmp_path / "a"))
    assert all(layer.base is None for layer in without.layers)


def test_a_square_conv1d_is_read_the_right_way_round(tiny_gpt2: Callable[..., Any], tmp_path: Path) -> None:
    base = tiny_gpt2()
    weights = weights_of(base)
    model = trained(base, LoraConfig(r=3, use_dora=True, target_modules=["attn.c_proj"]), size=0.0)
    for layer in measured(model, tmp_path / "a", weights).layers:
        assert layer.base is not None and layer.shape == (48, 48)
        assert layer.base.magnitude_change == pytest.approx(0, abs=1e-6)  # fresh: the lengths are the weight's


def test_pissa_is_measured_as_the_change_from_its_start(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(24, 20)})
    before = weights_of(model)["layer.weight"].double()
    attach(model, LoraConfig(r=3, lora_alpha=3, init_lora_weights="pissa", target_modules=["layer"]))
    fresh = measured(model, tmp_path / "fresh")
    assert [layer.delta_norm for layer in fresh.layers] == [0] and fresh.layers[0].numerical_rank == 0
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.add_(0.05 * torch.randn(item.parameter.shape))
    found = measured(model, tmp_path / "a")
    merge(model)
    change = model["layer"].weight.detach().double() - before
    S = torch.linalg.svdvals(change)
    assert found.layers[0].singular_values == pytest.approx(S[:6].tolist(), rel=1e-4)
    assert found.layers[0].numerical_rank == 6
    assert any("pissa" in remark and "twice the rank" in remark for remark in found.remarks)


def test_grouped_convolutions_and_attention(tmp_path: Path) -> None:
    base = Convolutions()
    weights = weights_of(base)
    (layer,) = measured(trained(base, LoraConfig(r=4, target_modules=["grouped"])), tmp_path / "a", weights).layers
    live = base.grouped.lora["default"]
    blocks = torch.block_diag(*live.lora_B.detach().double().flatten(1).chunk(2))
    update = live.scaling * blocks @ live.lora_A.detach().double().flatten(1)
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(update)[:4].tolist())
    assert layer.base is not None and layer.base.noise_floor is None  # it cannot be merged
    assert layer.base.share == pytest.approx((update.norm() / weights["grouped.weight"].double().norm()).item())
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3)})
    weights = weights_of(attention)
    found = measured(trained(attention, LoraConfig(r=2, target_modules=["attention"])), tmp_path / "b", weights)
    names = {"attention": "attention.in_proj_weight", "attention.out_proj": "attention.out_proj.weight"}
    norms = {layer.path: layer.base and layer.base.weight_norm for layer in found.layers}
    assert norms == {path: pytest.approx(weights[name].double().norm().item()) for path, name in names.items()}


def test_what_is_no_pair_is_told_by_its_norm(tmp_path: Path) -> None:
    base = Plain()
    weights = weights_of(base)
    model = trained(base, LoraConfig(r=2, target_modules=["first"], bias="lora_only", modules_to_save=["norm"]))
    saved = {item.key: item.parameter.detach().double() for item in adapter_parameters(model) if item.role == "whole"}
    others = {other.name: other for other in measured(model, tmp_path / "a", weights).others}
    assert set(others) == {"first.base_layer.bias", "norm.weight", "norm.bias"}
    for key in ("weight", "bias"):
        other = others[f"norm.{key}"]
        assert other.norm == pytest.approx(saved[key].norm().item())
        assert other.change_norm == pytest.approx((saved[key] - weights[f"norm.{key}"].double()).norm().item())
    bias = model.first.lora["default"].bias.detach().double()
    change = (bias - weights["first.bias"].double()).norm().item()
    assert others["first.base_layer.bias"].change_norm == pytest.approx(change)


def test_missing_and_foreign_weights_are_told(tmp_path: Path) -> None:
    base = Plain()
    weights = weights_of(base)
    model = trained(base, LoraConfig(r=2, target_modules=["first", "second"]))
    right = measured(model, tmp_path / "a", weights)
    assert not any("WRONG BASE" in remark for remark in right.remarks)
    only = {"first.weight": weights["first.weight"] + 0.01, "second.weight": weights["second.weight"][:, :5]}
    found = measured(model, tmp_path / "a", only)
    assert any("WRONG BASE? 2 of 2" in remark for remark in found.remarks)
    assert any("1 of 2 weights were not found" in remark and "second.weight" in remark for remark in found.remarks)
    assert [layer.base is None for layer in found.layers] == [False, True]


def test_a_linear_layer_among_target_parameters_is_measured_as_that_layer(tmp_path: Path) -> None:
    model = Plain()
    weights = weights_of(model)
    patterns: dict[str, Any] = {"rank_pattern": {"first.weight": 2}, "alpha_pattern": {"first.weight": 9}}
    config = LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=["first.weight"], **patterns)
    (layer,) = measured(trained(model, config), tmp_path / "a", weights).layers
    pair = model.first.lora["default"]
    delta = 9 / 2 * pair.lora_B.detach().double() @ pair.lora_A.detach().double()
    assert (layer.path, layer.kind, layer.r) == ("first", "linear", 2)
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(delta)[:2].tolist(), rel=1e-9)
    assert layer.base is not None
    assert layer.base.share == pytest.approx(float(delta.norm() / weights["first.weight"].double().norm()), rel=1e-6)


def test_the_original_of_a_base_in_4_bits_is_no_wrong_base(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama(layers=1)
    weights = weights_of(model)
    quantize_linears(model)
    found = measured(trained(model, LoraConfig(r=2, target_modules=["q_proj"])), tmp_path / "a", weights)
    (layer,) = found.layers
    assert layer.base is not None
    assert layer.base.weight_norm == pytest.approx(float(weights[f"{layer.path}.weight"].double().norm()), rel=1e-6)
    assert any("quantised copy (bitsandbytes)" in remark for remark in found.remarks)
    assert not any("WRONG" in remark for remark in found.remarks)
    others = weights | {"model.norm.weight": weights["model.norm.weight"] + 0.1}
    assert any("WRONG" in remark for remark in measured(model, tmp_path / "a", others).remarks)


def test_experts_have_no_share_and_what_is_left_out_is_said(tiny_moe: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_moe("mixtral", layers=1)
    weights = weights_of(model)
    config = {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    found = measured(trained(model, LoraConfig(**config)), tmp_path / "a", weights)
    assert [layer.kind for layer in found.layers if layer.base is not None] == ["linear"]
    assert {layer.kind for layer in found.layers if layer.base is None} == {"expert"}
    assert any("have no share" in remark for remark in found.remarks)
    assert not any("not found" in remark or "left out" in remark for remark in found.remarks)

    torn = trained(tiny_moe("mixtral", layers=1), LoraConfig(**config, rank_pattern={"down_proj": 1}))
    found = measured(torn, tmp_path / "b")
    assert [layer.kind for layer in found.layers] == ["linear"]
    assert any("2 pairs are left out" in remark for remark in found.remarks)
