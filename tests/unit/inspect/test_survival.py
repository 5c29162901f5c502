"""merge_survival(): what each form leaves of a change, beside the dense expression in float64 and bitsandbytes' own 4 bits."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, attach, quantize_linears
from luthier.adapt.merging import merge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.inspect.survival import EXPORTS, merge_survival

Make = Callable[..., nn.Module]


def learned(model: nn.Module, *, size: float = 0.1, name: str = "default", **config: object) -> nn.Module:
    """Attach an adapter and give it numbers as if it had been trained."""
    attach(model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]} | config)), name)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and f".{name}." in key:
                parameter.add_(size * torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
    return model


def in_4_bits(weight: Tensor) -> Tensor:
    """Return what bitsandbytes reads back of a weight that it put into 4 bits."""
    functional = pytest.importorskip("bitsandbytes").functional
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4"))


def by_hand(weights: list[Tensor], changes: list[Tensor], form: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return (kept, error) of W and D in float64, rounded to `form`; `dtype` is that of the layer."""
    dot = missed = size = 0.0
    for w, d in zip(weights, changes, strict=True):
        written = in_4_bits((w + d).to(dtype)) if form == "nf4" else (w + d).to(getattr(torch, form))
        dot += float(((written.double() - w) * d).sum())
        missed += float((written.double() - (w + d)).square().sum())
        size += float(d.square().sum())
    return dot / size, math.sqrt(missed / size)


METHODS = {
    "lora": ({}, 5 / 3),
    "rslora": ({"use_rslora": True}, 5 / math.sqrt(3)),
    "dora": ({"use_dora": True}, 5 / 3),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4 bits"])
def test_kept_and_error_are_those_of_the_dense_expression_in_float64(tiny_llama: Make, method: str, base: str) -> None:
    config, scaling = METHODS[method]
    model = tiny_llama(hidden=64, dtype=torch.bfloat16 if base == "bfloat16" else torch.float32)
    if base == "4 bits":
        quantize_linears(model)
    plain = {path: module.weight.detach().clone().double() for path, module in model.named_modules() if hasattr(module, "weight")}
    learned(model, size=0.02, **config)
    found = merge_survival(model)
    assert [kind.kind for kind in found.kinds] == ["q_proj", "down_proj"]
    changes: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "lora"):
            continue
        numbers = {key: tensor.detach().double() for key, tensor in module.lora["default"].named_parameters()}
        w, d = plain[path], scaling * numbers["lora_B"] @ numbers["lora_A"]
        if "magnitude" in numbers:
            d = numbers["magnitude"][:, None] * (w + d) / (w + d).norm(dim=1, keepdim=True) - w
        changes.setdefault(path.rpartition(".")[2], []).append((w, d))
    everything = [pair for pairs in changes.values() for pair in pairs]
    for kind, pairs in zip((*found.kinds, found.total), (*changes.values(), everything), strict=True):
        ws, ds = ([pair[index] for pair in pairs] for index in (0, 1))
        assert kind.num_parameters == len(pairs)
        assert kind.share == pytest.approx(
            torch.cat([d.flatten() for d in ds]).norm() / torch.cat([w.flatten() for w in ws]).norm()
        )
        for form in EXPORTS:
            kept, error = by_hand(ws, ds, form, model.dtype)
            # One number at the edge of two codes may fall to the other side by the last bit of the sum.
            assert kind.exports[form].kept == pytest.approx(kept, abs=1e-3 if form == "nf4" else 1e-5), (kind.kind, form)
            assert kind.exports[form].error == pytest.approx(error, rel=1e-3, abs=1e-6), (kind.kind, form)


def single(share: float, *, quantised: bool) -> nn.Module:
    """Return one layer of normal numbers whose update has this share of its weight's norm."""
    model = nn.Sequential(nn.Linear(256, 192, bias=False))
    nn.init.normal_(model[0].weight)
    if quantised:
        quantize_linears(model)
    attach(model, LoraConfig(r=8, lora_alpha=8, target_modules=["0"]))
    pair = model[0].lora["default"]
    with torch.no_grad():
        pair.lora_B.normal_()
        pair.lora_B.mul_(share * model[0].weight.norm() / (pair.lora_B @ pair.lora_A).norm())
    return model


@pytest.mark.parametrize(("share", "least", "most"), [(0.003, 0.0, 0.03), (0.01, 0.0, 0.03), (0.1, 0.7, 0.95), (0.3, 0.97, 1.02)])
def test_a_small_update_of_a_base_in_4_bits_is_lost_when_put_back_there(share: float, least: float, most: float) -> None:
    """Only the largest number of each 64 moves with its scale: 1/64 = 0.016."""
    found = merge_survival(single(share, quantised=True))
    assert found.total.share == pytest.approx(share, rel=1e-3)
    assert least < found.total.exports["nf4"].kept < most
    assert found.total.exports["float32"].kept == pytest.approx(1, abs=1e-4)
    assert "quantize none" in found.remarks[-1]


def test_from_the_float_base_it_is_kept_under_the_error_of_4_bits() -> None:
    found = merge_survival(single(0.1, quantised=False)).total.exports["nf4"]
    assert found.kept == pytest.approx(1, abs=0.06)
    assert found.error == pytest.approx(0.092 / 0.1, rel=0.05), "4 bits alone lose 9.2 % of a normal weight"


def test_a_narrower_float_keeps_less() -> None:
    exports = merge_survival(single(0.01, quantised=False)).total.exports
    assert exports["bfloat16"].error == pytest.approx(0.165, rel=0.05)
    assert exports["float16"].error == pytest.approx(0.165 / 8, rel=0.05)
    assert exports["float32"].error < 1e-5
    assert exports["bfloat16"].kept == pytest.approx(1, abs=0.02)


OTHERS = {
    "bias": {"bias": "lora_only", "lora_bias": False},
    "saved head": {"modules_to_save": ["lm_head"]},
    "table": {"target_modules": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [3, 42]},
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_that_a_merge_changes_is_counted(tiny_llama: Make, name: str) -> None:
    """By a merge of the same model in float64, where rounding does not show."""
    model = learned(tiny_llama(attention_bias=name == "bias"), **OTHERS[name])
    wide = copy.deepcopy(model).double()
    before = {key: tensor.clone() for key, tensor in wide.state_dict().items()}
    merge(wide)
    change = {key: tensor - before[key] for key, tensor in wide.state_dict().items()}
    squares = {key: float(each.square().sum()) for key, each in change.items() if each.any()}
    found = merge_survival(model)
    weights = sum(float(before[key].square().sum()) for key in squares)
    assert found.total.num_parameters == len(squares) > 0
    assert found.total.share == pytest.approx(math.sqrt(sum(squares.values()) / weights), rel=1e-5)
    assert found.total.exports["float32"].error < 1e-5


def test_adapters_that_run_together_are_one_change(tiny_llama: Make) -> None:
    model = learned(tiny_llama(), target_modules=["q_proj"])
    alone = merge_survival(model).total
    learned(model, name="other", target_modules=["q_proj"])
    activate(model, {"default": 1.0, "other": 1.0})
    assert merge_survival(model).total.share != pytest.approx(alone.share, rel=1e-2)
    activate(model, {"default": 2.0})
    assert merge_survival(model).total.share == pytest.approx(2 * alone.share, rel=1e-6)


def test_gpt2_keeps_its_weights_turned(tiny_gpt2: Make) -> None:
    model = learned(tiny_gpt2(), target_modules=["c_attn"])
    exports = merge_survival(model).total.exports
    assert exports["float32"].error < 1e-5
    assert exports["nf4"] == exports["float32"], "a Conv1D is not put into 4 bits"


def test_the_model_is_left_as_it_was(tiny_llama: Make) -> None:
    model = learned(tiny_llama())
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.named_parameters()}
    merge_survival(model)
    after = dict(model.named_parameters())
    assert all(id(after[key]) == where and torch.equal(after[key], tensor) for key, (where, tensor) in before.items())


def test_an_adapter_that_changes_nothing_has_nothing_to_keep(tiny_llama: Make) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(r=3, target_modules=["q_proj"]))
    found = merge_survival(model).total
    assert found.share == 0
    assert all(math.isnan(each.kept) and math.isnan(each.error) for each in found.exports.values())


def test_weights_too_large_for_a_form_are_told() -> None:
    model = single(0.1, quantised=False)
    with torch.no_grad():
        model[0].weight[0, 0] = 1e5
    found = merge_survival(model)
    assert math.isinf(found.total.exports["float16"].error)
    assert found.remarks == ("Some merged weights are too large for float16.",)


def test_a_merged_model_has_no_change_to_measure(tiny_llama: Make) -> None:
    model = learned(tiny_llama())
    merge(model)
    with pytest.raises(AdapterStateError, match="merged already"):
        merge_survival(model)
