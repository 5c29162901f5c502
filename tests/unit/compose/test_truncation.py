"""truncate(): each layer becomes what dense singular values in float64 say is nearest, and the errors told are the dense ones."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.parity.cases import Convolutions, Plain
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.ranks import adalora_pairs, drop_masked
from luthier.adapt.state import adapter_parameters
from luthier.compose import Truncation, truncate
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError, StorageError
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.folder import read_adapter, write_adapter

Updates = dict[str, Tensor]


def randomised(model: nn.Module, config: LoraConfig, sizes: tuple[float, ...] = ()) -> nn.Module:
    """Attach an adapter of random numbers; with `sizes`, rank i of each layer is that much stronger."""
    attach(model, config)
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.add_(torch.randn(item.parameter.shape) * 0.3)
            if item.role == "lora_A" and sizes:
                r = len(item.parameter)
                item.parameter.mul_(torch.tensor(sizes[:r]).view(-1, *(1 for _ in item.parameter.shape[1:])))
    return model


def updates(model: nn.Module) -> Updates:
    """Return path -> the dense update of a live model's pairs in float64, the window of a convolution flattened."""
    found = {}
    for path, module in model.named_modules():
        if "default" in getattr(module, "lora", {}):
            pair = module.lora["default"]
            parts = {path: pair} | ({f"{path}.out_proj": pair.out} if pair.out is not None else {})
            for name, part in parts.items():
                A, B = (factor.detach().double().flatten(1) for factor in part.factors())
                found[name] = part.scaling * B @ A
    return found


def nearest(dense: Tensor, r: int) -> Tensor:
    """Return the nearest matrix of rank r, by the dense decomposition."""
    U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
    return U[:, :r] * S[:r] @ Vt[:r]


def check(done: Truncation, before: Updates, after: Updates, ranks: dict[str, int]) -> None:
    assert {layer.path: layer.r_after for layer in done.layers} == ranks
    lost = whole = 0.0
    for layer in done.layers:
        dense, r = before[layer.path], ranks[layer.path]
        torch.testing.assert_close(after[layer.path], nearest(dense, r), rtol=1e-5, atol=1e-5)
        error = torch.linalg.svdvals(dense)[r:].norm().item()
        assert layer.predicted == pytest.approx(error, rel=1e-9, abs=1e-9)
        assert layer.measured == pytest.approx(torch.linalg.matrix_norm(dense - after[layer.path]).item(), rel=1e-4, abs=1e-5)
        assert layer.norm == pytest.approx(torch.linalg.matrix_norm(dense).item(), rel=1e-9)
        lost, whole = lost + error**2, whole + layer.norm**2
    assert done.predicted == pytest.approx((lost / whole) ** 0.5, rel=1e-9)
    assert done.measured == pytest.approx(done.predicted, rel=1e-4, abs=1e-6)


MODELS: dict[str, Any] = {
    "plain": Plain,
    "convolutions": Convolutions,
    "attention": lambda: nn.ModuleDict({"attention": nn.MultiheadAttention(12, 3)}),
}
KINDS = {
    "linear and embedding": ("plain", {"target_modules": ["table", "first", "second"]}),
    "rslora and patterns": (
        "plain",
        {
            "target_modules": ["table", "first", "second"],
            "use_rslora": True,
            "rank_pattern": {"first": 3, "table": 7},
            "alpha_pattern": {"sec.*": 11.5},
        },
    ),
    "convolutions": ("convolutions", {"target_modules": ["line", "plane", "volume"]}),
    "attention": ("attention", {"target_modules": ["attention"]}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_every_layer_becomes_its_nearest_of_lower_rank(kind: str, rank: int, tmp_path: Path) -> None:
    model, settings = KINDS[kind]
    live = randomised(MODELS[model](), LoraConfig(r=5, lora_alpha=7, **settings))
    folder = save_adapter(live, tmp_path / "given")
    done = truncate(folder, tmp_path / "cut", rank=rank)
    fresh = MODELS[model]()
    fresh.load_state_dict({key: value for key, value in live.state_dict().items() if ".lora." not in key})
    load_adapter(fresh, tmp_path / "cut")
    before = updates(live)
    check(done, before, updates(fresh), {layer.path: min(rank, layer.r_before) for layer in done.layers})
    scalings = {path: module.lora["default"].scaling for path, module in live.named_modules() if hasattr(module, "lora")}
    for path, scaling in scalings.items():
        assert fresh.get_submodule(path).lora["default"].scaling == pytest.approx(scaling, rel=1e-11)
    config = json.loads((tmp_path / "cut/adapter_config.json").read_text())
    if "rank_pattern" not in settings:
        assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
            rank,
            7 * rank / 5,
            {},
            {},
        )


def test_energy_gives_each_layer_the_ranks_it_needs(tmp_path: Path) -> None:
    live = randomised(Plain(), LoraConfig(r=6, lora_alpha=6, target_modules=["table", "first", "second"]), (9, 4, 2, 1, 0.5, 0.2))
    folder, before = save_adapter(live, tmp_path / "given"), updates(live)
    seen = set()
    for share in (0.5, 0.9, 0.99, 0.99999, 1.0):
        done = truncate(folder, tmp_path / "cut", energy=share)
        ranks = {}
        for path, dense in before.items():
            squares = torch.linalg.svdvals(dense).square()
            held = [float(squares[:r].sum() / squares.sum()) for r in range(1, 7)]
            ranks[path] = 6 if share == 1 else next(r for r, it in enumerate(held, 1) if it >= share)
        fresh = Plain()
        load_adapter(fresh, tmp_path / "cut", force=True)
        check(done, before, updates(fresh), ranks)
        for layer in done.layers:
            assert layer.predicted <= (1 - share) ** 0.5 * layer.norm + 1e-6
        seen |= set(ranks.values())
    assert len(seen) > 3


def test_a_layer_that_has_no_more_is_bit_for_bit_as_it_was(tmp_path: Path) -> None:
    config = LoraConfig(r=5, target_modules=["table", "first"], rank_pattern={"first": 2}, modules_to_save=["norm"])
    folder = save_adapter(randomised(Plain(), config), tmp_path / "given")
    done = truncate(folder, tmp_path / "cut", rank=3)
    notes = {layer.path: (layer.r_before, layer.r_after, layer.note) for layer in done.layers}
    assert notes == {"first": (2, 2, "needs no less than it has"), "table": (5, 3, "")}
    before, after = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "cut"))
    assert before.keys() == after.keys()
    kept = [key for key in before if "table" not in key]
    assert any("norm" in key for key in kept) and all(torch.equal(before[key], after[key]) for key in kept)
    (first,) = (layer for layer in done.layers if layer.path == "first")
    assert (first.predicted, first.measured) == (0, pytest.approx(0, abs=1e-12))
    assert done.num_parameters == (2 * (13 + 31) + 5 * (211 + 13) + 62, 2 * (13 + 31) + 3 * (211 + 13) + 62)
    truncate(folder, tmp_path / "all", rank=64)
    assert all(torch.equal(value, before[key]) for key, value in load_file(tmp_path / "all/adapter_model.safetensors").items())


def test_grouped_convolutions_stay_and_say_why(tmp_path: Path) -> None:
    folder = save_adapter(randomised(Convolutions(), LoraConfig(r=4, target_modules=["grouped", "line"])), tmp_path / "given")
    done = truncate(folder, tmp_path / "cut", rank=2)
    assert {layer.path: (layer.r_after, layer.note) for layer in done.layers} == {
        "grouped": (4, "its ranks belong to 2 groups each"),
        "line": (2, ""),
    }
    load_adapter(Convolutions(), tmp_path / "cut", force=True)


def test_an_adapter_in_16_bits_stays_in_16_bits(tmp_path: Path) -> None:
    live = randomised(Plain(), LoraConfig(r=5, target_modules=["first"]))
    folder = save_adapter(live, tmp_path / "given")
    text = (folder / "adapter_config.json").read_text()
    half = {key: tensor.bfloat16() for key, tensor in read_adapter(folder).tensors.items()}
    write_adapter(tmp_path / "half", text, half, "", {})
    done = truncate(tmp_path / "half", tmp_path / "cut", rank=2)
    assert {tensor.dtype for tensor in read_adapter(tmp_path / "cut").tensors.values()} == {torch.bfloat16}
    # What is measured includes the rounding of the written numbers, what is foretold does not.
    assert 0 < done.measured - done.predicted < 0.01


@pytest.mark.parametrize("drops", [False, True])
def test_adalora_becomes_plain_lora(drops: bool, tmp_path: Path) -> None:
    live = randomised(Plain(), AdaLoraConfig(init_r=5, target_r=3, lora_alpha=4, target_modules=["first", "second"]))
    with torch.no_grad():
        for (_, pair), mask in zip(adalora_pairs(live), ([1, 1, 0, 1, 1], [0, 0, 0, 0, 0]), strict=True):
            pair.lora_E.mul_(torch.tensor(mask).unsqueeze(1))
    before = updates(live)
    if drops:
        drop_masked(live)
    folder = save_adapter(live, tmp_path / "given")
    done = truncate(folder, tmp_path / "cut", rank=3)
    assert {layer.path: layer.r_after for layer in done.layers} == {"first": 3, "second": 0}
    after = read_adapter(tmp_path / "cut")
    assert type(after.config) is LoraConfig and after.config.target_modules == ["first"]
    fresh = Plain()
    load_adapter(fresh, tmp_path / "cut", force=True)
    torch.testing.assert_close(updates(fresh)["first"], nearest(before["first"], 3), rtol=1e-5, atol=1e-5)


def test_dora_keeps_its_lengths_and_says_what_the_error_is_of(tmp_path: Path) -> None:
    live = randomised(Plain(), LoraConfig(r=5, use_dora=True, target_modules=["first"]))
    folder = save_adapter(live, tmp_path / "given")
    done = truncate(folder, tmp_path / "cut", rank=2)
    assert done.caveat.startswith("DoRA: ")
    fresh = Plain()
    load_adapter(fresh, tmp_path / "cut", force=True)
    torch.testing.assert_close(updates(fresh)["first"], nearest(updates(live)["first"], 2), rtol=1e-5, atol=1e-5)
    merged = fresh.first.weight + fresh.first.lora["default"].update(fresh.first.weight)
    torch.testing.assert_close(
        merged.norm(dim=1).float(), live.first.lora["default"].magnitude.detach().abs(), rtol=1e-5, atol=1e-5
    )


def test_the_truncated_adapter_answers_in_peft_as_the_dense_algebra_says(tiny_gpt2: Any, tmp_path: Path) -> None:
    """On transformers' Conv1D, whose weight is stored (in, out): PEFT needs the word for it in the configuration."""
    live = randomised(tiny_gpt2(), LoraConfig(r=5, lora_alpha=9, target_modules=["c_attn", "c_fc"]))
    truncate(save_adapter(live, tmp_path / "given"), tmp_path / "cut", rank=2)
    dense = tiny_gpt2().double()
    with torch.no_grad():
        for path, update in updates(live).items():
            dense.get_parameter(f"{path}.weight").add_(nearest(update, 2).T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        theirs = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "cut").eval()
    ids = torch.tensor([[5, 17, 200, 3, 42, 42, 9]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits.double(), dense(ids).logits, rtol=1e-4, atol=1e-4)
        assert (theirs(ids).logits - live(ids).logits).abs().max() > 1e-3


def test_the_recipe_names_the_adapter_that_it_came_from(tmp_path: Path) -> None:
    live = randomised(Plain(), LoraConfig(r=5, target_modules=["first"]))
    folder = save_adapter(live, tmp_path / "given", recipe={"step": 7}, metrics={"loss": 0.5})
    done = truncate(folder, tmp_path / "cut", rank=2)
    given, note = (json.loads((path / "luthier.json").read_text()) for path in (folder, tmp_path / "cut"))
    assert note["base"] == given["base"] and note["recipe"]["step"] == 7 and note["metrics"] == {}
    truncated = note["recipe"]["truncated"]
    assert (truncated["rank"], truncated["predicted"]) == (2, pytest.approx(done.predicted))
    assert truncated["parent"] == {"folder": "given", "files": given["files"], "metrics": {"loss": 0.5}}
    first = (tmp_path / "cut/luthier.json").read_bytes()
    truncate(folder, tmp_path / "cut", rank=2)
    assert (tmp_path / "cut/luthier.json").read_bytes() == first  # the same bytes, digests of tensors included


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = save_adapter(randomised(Plain(), LoraConfig(r=3, target_modules=["first"])), tmp_path / "given")
    for asked, told in (
        ({}, "say either"),
        ({"rank": 1, "energy": 0.5}, "say either"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0"),
        ({"energy": 95.0}, "energy is 95"),
    ):
        with pytest.raises(ConfigError, match=told):
            truncate(folder, tmp_path / "cut", **asked)
    with pytest.raises(ConfigError, match="the adapter itself"):
        truncate(folder, tmp_path / "x/../given", rank=1)
    unpaired = save_adapter(randomised(Plain(), LoraConfig(target_modules=[], modules_to_save=["norm"])), tmp_path / "norm")
    with pytest.raises(AdapterStateError, match="has no pairs"):
        truncate(unpaired, tmp_path / "cut", rank=1)
    fresh = Plain()
    attach(fresh, AdaLoraConfig(target_modules=["first"]))
    with pytest.raises(AdapterStateError, match="every triplet"):
        truncate(save_adapter(fresh, tmp_path / "fresh"), tmp_path / "cut", rank=1)
    assert not (tmp_path / "cut").exists()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match=r"thesis\.tex"):
        truncate(folder, tmp_path / "cut", rank=1)
    assert [file.name for file in (tmp_path / "cut").iterdir()] == ["thesis.tex"]


def test_an_update_of_zero_keeps_one_rank(tmp_path: Path) -> None:
    model = Plain()
    attach(model, LoraConfig(r=4, target_modules=["first"]))
    done = truncate(save_adapter(model, tmp_path / "given"), tmp_path / "cut", energy=0.9)
    assert (done.layers[0].r_after, done.predicted, done.measured) == (1, 0, 0)
    load_adapter(Plain(), tmp_path / "cut", force=True)


@pytest.mark.parametrize("patterns", [{}, {"down_proj": 1}], ids=str)
def test_experts_are_refused_by_name(tiny_moe: Any, tmp_path: Path, patterns: dict[str, int]) -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=2, target_modules=[], target_parameters=experts, rank_pattern=patterns)
    folder = save_adapter(randomised(tiny_moe("mixtral", layers=1), config), tmp_path / "given")
    with pytest.raises(AdapterStateError, match=r"adapts the parameters experts\.\w+, experts\.\w+, which are not"):
        truncate(folder, tmp_path / "cut", rank=1)
