"""Adapters as the engine reads them: pairs that are the file's numbers, or the reason for a merge, and nothing that does not fit.

Expected numbers are formed here in float64 from the tensors in the files.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.served_adapters import TENSORS, cut_short, lose_tensors, poison, put_nan, save_random_adapter
from torch import Tensor, nn

from luthier.adapt import adapter_parameters, attach, attach_loftq, quantize_linears
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    BaseMismatchError,
    LuthierError,
)
from luthier.engine.adapters import AdapterWeights, ServedBase, content_key, read_for_serving
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.folder import read_adapter

Make = Callable[..., nn.Module]
Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"


@pytest.fixture
def folder(tiny_llama: Make, tmp_path: Path) -> Path:
    """Return the folder of an adapter of q_proj and down_proj, r=3 and alpha=5, for `tiny_llama()`."""
    return save_random_adapter(tmp_path / "orders", tiny_llama())


@pytest.fixture
def base(tiny_llama: Make) -> ServedBase:
    return ServedBase.of(tiny_llama())


def stored(folder: Path, path: str, role: str) -> Tensor:
    return load_file(folder / TENSORS)[f"base_model.model.{path}.{role}"].double()


def delta_of(weights: AdapterWeights, path: str) -> Tensor:
    return weights.pairs[path].B.double() @ weights.pairs[path].A.double()


def assert_close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for one rounding to float32."""
    assert (found - wanted).abs().max() <= 2e-7 * wanted.abs().max()


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"r": 3, "lora_alpha": 5}, {Q0: 5 / 3, DOWN1: 5 / 3}),
        ({"r": 7, "lora_alpha": 2.5, "use_rslora": True}, {Q0: 2.5 / 7**0.5, DOWN1: 2.5 / 7**0.5}),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}}, {Q0: 8 / 2, DOWN1: 3 / 4}),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_a_pair_is_the_file_s_with_the_scaling_in_it(
    config: dict[str, object], scaling: dict[str, float], tiny_llama: Make, base: ServedBase, tmp_path: Path
) -> None:
    folder = save_random_adapter(tmp_path / "orders", tiny_llama(), **config)
    weights = read_for_serving(folder, base)
    assert (weights.name, weights.needs_merge, weights.folder) == ("orders", None, None)
    assert len(weights.pairs) == 4 and weights.rank == config["r"]
    for path, factor in scaling.items():
        wanted = factor * stored(folder, path, "lora_B.weight") @ stored(folder, path, "lora_A.weight")
        assert_close(delta_of(weights, path), wanted)
        assert weights.pairs[path].magnitude is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_s_magnitude_is_over_the_norm_of_the_base_and_the_pair(dtype: torch.dtype, tiny_llama: Make, tmp_path: Path) -> None:
    folder = save_random_adapter(tmp_path / "orders", tiny_llama(dtype=dtype), use_dora=True)
    model = tiny_llama(dtype=dtype)
    weights = read_for_serving(folder, ServedBase.of(model))
    for path in (Q0, DOWN1):
        changed = model.get_submodule(path).weight.detach().double() + delta_of(weights, path)
        wanted = stored(folder, path, "lora_magnitude_vector") / changed.norm(dim=1)
        assert_close(weights.pairs[path].magnitude.double(), wanted)
    assert weights.bytes == sum(pair.bytes for pair in weights.pairs.values())
    assert weights.pairs[Q0].bytes == 4 * (3 * 48 + 48 * 3 + 48)


def test_what_adalora_pruned_takes_no_room(tiny_llama: Make, base: ServedBase, tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], total_step=40))
    sizes = {Q0: [0.5, 0, -2, 0], DOWN1: [0, 0, 0, 0], "model.layers.1.self_attn.q_proj": [0, 3, 0, 0]}
    with torch.no_grad():
        for item in adapter_parameters(model, "default"):
            item.parameter.add_(0.3 * torch.randn_like(item.parameter))
            if item.role == "lora_E":
                item.parameter.copy_(torch.tensor(sizes.get(item.path, [1, 1, 1, 1]))[:, None])
    folder = save_adapter(model, tmp_path / "pruned")
    weights = read_for_serving(folder, base)
    assert {path: len(pair.A) for path, pair in weights.pairs.items()} == {
        Q0: 2,
        "model.layers.1.self_attn.q_proj": 1,
        "model.layers.0.mlp.down_proj": 4,
    }
    assert weights.rank == 4
    A, B = stored(folder, Q0, "lora_A"), stored(folder, Q0, "lora_B")
    wanted = B @ torch.diag(torch.tensor(sizes[Q0]).double()) @ A
    found = delta_of(weights, Q0)
    scaling = (found * wanted).sum() / (wanted * wanted).sum()  # the parity tests say which one it is
    assert_close(found, scaling * wanted)


def test_an_adapter_that_changes_nothing_is_served_too(tiny_llama: Make, base: ServedBase, tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=40))
    with torch.no_grad():
        for item in adapter_parameters(model, "default"):
            item.parameter.zero_()
    weights = read_for_serving(save_adapter(model, tmp_path / "silent"), base)
    assert (weights.pairs, weights.rank, weights.bytes, weights.needs_merge) == ({}, 1, 0, None)


# --- what is merged --------------------------------------------------------------------------------------------------

MERGED = {
    "a table": ({"target_modules": ["embed_tokens", "q_proj"]}, "layers of kind embedding", "model.embed_tokens"),
    "a module whole": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "it trains modules whole", "lm_head"),
    "biases": ({"target_modules": ["q_proj"], "bias": "lora_only"}, "it trains biases", Q0),
    "its own biases": ({"target_modules": ["q_proj"], "lora_bias": True}, "it trains biases", Q0),
    "rows": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 8]},
        "it trains rows of tokens",
        "model.embed_tokens",
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_what_cannot_be_added_to_rows_says_why_and_brings_its_folder(case: str, tiny_llama: Make, tmp_path: Path) -> None:
    config, reason, path = MERGED[case]
    settings = {"attention_bias": True} if "biases" in case else {}
    folder = save_random_adapter(tmp_path / "orders", tiny_llama(**settings), **config)
    weights = read_for_serving(folder, ServedBase.of(tiny_llama(**settings)))
    assert weights.needs_merge is not None and reason in weights.needs_merge and path in weights.needs_merge
    assert (weights.pairs, weights.rank) == ({}, 1)
    assert weights.folder is not None and weights.folder.path == folder
    assert weights.bytes == sum(tensor.numel() * tensor.element_size() for tensor in load_file(folder / TENSORS).values())


def test_a_pair_outside_what_is_batched_is_merged_with_the_rest(tiny_llama: Make, folder: Path) -> None:
    places = [Q0, DOWN1, "model.layers.1.self_attn.q_proj"]
    weights = read_for_serving(folder, ServedBase.of(tiny_llama(), places=places))
    assert weights.needs_merge == "it adapts layers outside what is batched (model.layers.0.mlp.down_proj)"
    assert weights.pairs == {}
    both = read_for_serving(folder, ServedBase.of(tiny_llama(), places=[*places, "model.layers.0.mlp.down_proj"]))
    assert both.needs_merge is None and len(both.pairs) == 4
    none = read_for_serving(folder, ServedBase.of(tiny_llama(), places=()))
    assert none.needs_merge is not None and none.needs_merge.endswith(f"{Q0.replace('0', '1')} and 1 more)")


# --- what is refused -------------------------------------------------------------------------------------------------


def other_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    (folder / "luthier.json").unlink()


def unknown_target(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    (folder / "luthier.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (cut_short, AdapterFormatError),
        (poison, AdapterFormatError),
        (put_nan, AdapterFormatError),
        (lose_tensors, AdapterFormatError),
        (lambda folder: shutil.rmtree(folder), AdapterFormatError),
        (other_rank, AdapterMismatchError),
        (unknown_target, AdapterMismatchError),
    ],
    ids=["cut short", "poisoned", "nan", "no tensors", "no folder", "another rank", "another target"],
)
def test_it_is_as_strict_as_attaching(
    spoil: Callable[[Path], None], kind: type[LuthierError], folder: Path, base: ServedBase, tiny_llama: Make
) -> None:
    spoil(folder)
    with pytest.raises(kind) as attaching:
        load_adapter(tiny_llama(), folder)
    with pytest.raises(kind) as serving:
        read_for_serving(folder, base)
    assert type(serving.value) is type(attaching.value)
    assert str(serving.value) == str(attaching.value)


def test_another_base_of_the_same_shapes_is_refused(folder: Path, tiny_llama: Make) -> None:
    with pytest.raises(BaseMismatchError, match=r"'orders'.* was trained on another base"):
        read_for_serving(folder, ServedBase.of(tiny_llama(seed=1)))


def test_the_verdict_on_the_base_comes_along(folder: Path, base: ServedBase, tiny_llama: Make) -> None:
    assert read_for_serving(folder, base).base.verdict == "exact"
    assert read_for_serving(folder, ServedBase.of(tiny_llama(dtype=torch.bfloat16))).base.verdict == "exact"
    (folder / "luthier.json").unlink()
    assert read_for_serving(folder, base).base.verdict == "unknown"


def test_an_adapter_fitted_to_a_base_in_4_bits_is_served_on_that_one_only(tiny_llama: Make, tmp_path: Path) -> None:
    sizes = {"hidden": 64}  # NF4 blocks are of 64 numbers
    made = tiny_llama(**sizes)
    attach_loftq(made, LoraConfig(r=2, init_lora_weights="loftq", loftq_config={"loftq_iter": 1}, target_modules=["q_proj"]))
    folder = save_adapter(made, tmp_path / "fitted")
    with pytest.raises(BaseMismatchError, match=r"(?s)made by init 'loftq'.*Serve it on that base"):
        read_for_serving(folder, ServedBase.of(tiny_llama(**sizes)))
    packed = tiny_llama(**sizes)
    quantize_linears(packed)
    weights = read_for_serving(folder, ServedBase.of(packed))
    wanted = 4 * stored(folder, Q0, "lora_B.weight") @ stored(folder, Q0, "lora_A.weight")  # alpha 8 / r 2
    assert_close(delta_of(weights, Q0), wanted)


# --- the base, and who an adapter is ---------------------------------------------------------------------------------


def test_a_served_base_holds_no_numbers_and_leaves_the_model_alone(tiny_llama: Make) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    base = ServedBase.of(model)
    assert all(parameter.is_meta for parameter in base.skeleton.parameters())
    assert base.skeleton.lm_head.weight is base.skeleton.model.embed_tokens.weight
    assert {name: each.shape for name, each in base.skeleton.named_parameters()} == {
        name: each.shape for name, each in before.items()
    }
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert base.weight(f"{Q0}.weight") is model.get_parameter(f"{Q0}.weight")


def test_a_model_with_adapters_is_no_base(tiny_llama: Make) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match=r"detach\(model\) first"):
        ServedBase.of(model)


def test_the_key_is_of_the_content_and_of_nothing_else(folder: Path, tiny_llama: Make, tmp_path: Path) -> None:
    def key(place: Path) -> str:
        return content_key(read_adapter(place))

    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    assert key(copy) == key(folder)
    (copy / "README.md").write_text("what is told about an adapter is not the adapter")
    assert key(copy) == key(folder)
    (copy / "luthier.json").unlink()  # it named the base
    without_base = key(copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 6}))
    other_config = key(copy)
    other_numbers = key(save_random_adapter(tmp_path / "other", tiny_llama(), seed=1))
    assert len({key(folder), without_base, other_config, other_numbers}) == 4


def test_it_is_known_by_the_name_it_is_given(folder: Path, base: ServedBase) -> None:
    assert read_for_serving(folder, base, "shop").name == "shop"
    read = read_adapter(folder)
    assert read_for_serving(read, base).name == "orders" and read_for_serving(read, base).key == content_key(read)
