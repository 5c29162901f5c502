"""merge() and unmerge(): the merged weight is the float32 sum rounded once, and the way back is exact, wherever it leads."""

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, attach, base_parameters, detach, disabled, merge, roster_of, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError, AdapterStateError, ConfigError, StorageError

TARGETS = ["q_proj", "down_proj", "embed_tokens", "lm_head"]


def float32_delta(model: nn.Module, path: str, scaling: float, name: str = "default") -> Tensor:
    """scaling * B A in float32, by hand."""
    pair = model.get_submodule(path).lora[name]
    return (pair.lora_B.detach().float() @ pair.lora_A.detach().float()) * scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_merged_weight_is_the_float32_sum_rounded_once(
    tiny_llama: Callable, fill: Callable, dtype: torch.dtype, tied: bool
) -> None:
    model = tiny_llama(dtype=dtype, tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS))
    fill(model)
    merge(model)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.embed_tokens", "lm_head"):
        before, delta = base.get_submodule(path).weight.detach(), float32_delta(model, path, 1.5)
        want = (before.float() + (delta.T if path.endswith("embed_tokens") else delta)).to(dtype)
        assert torch.equal(model.get_submodule(path).weight, want), path
        assert not torch.equal(want, before)
    untouched = "model.layers.0.self_attn.k_proj"
    assert torch.equal(model.get_submodule(untouched).weight, base.get_submodule(untouched).weight)


def test_merged_conv1d_weight_is_turned(tiny_gpt2: Callable, fill: Callable) -> None:
    model = tiny_gpt2()
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"]))
    fill(model)
    merge(model)
    path = "transformer.h.1.attn.c_attn"
    want = base.get_submodule(path).weight + float32_delta(model, path, 1.5).T
    assert torch.equal(model.get_submodule(path).weight, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [{"one": 1.0}, {"one": 0.25}, {"one": 1.0, "two": -0.5}, {"two": 1.0, "three": 1.0}])
@pytest.mark.parametrize("make", ["tiny_llama", "tiny_gpt2"])
def test_dora_is_merged_over_the_unmerged_base_and_comes_back_bit_exact(
    request: pytest.FixtureRequest, fill: Callable, snapshot: Callable, ids: Tensor, dtype: torch.dtype, weights: dict, make: str
) -> None:
    """W + the sum of w_i ((m_i/n_i) (W + delta_i) - W), each norm over the base alone; "three" is a plain LoRA."""
    model = request.getfixturevalue(make)(dtype=dtype)
    targets = ["q_proj", "down_proj", "embed_tokens"] if make == "tiny_llama" else ["c_attn", "c_fc", "wte"]
    base = copy.deepcopy(model)
    for name, use_dora in (("one", True), ("two", True), ("three", False)):
        attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=use_dora), name)
        fill(model, name)
    activate(model, weights)
    adapted, before = model(ids).logits, snapshot(model)
    merge(model)
    seen = 0
    for path, module in model.named_modules():
        if "one" not in getattr(module, "lora", {}):
            continue
        turned = type(base.get_submodule(path)).__name__ != "Linear"
        own = base.get_submodule(path).weight.detach().double()
        own = want = own.T if turned else own
        for name, weight in weights.items():
            pair = copy.deepcopy(module.lora[name]).double()
            inner = own + 1.5 * pair.lora_B @ pair.lora_A
            if name != "three":
                inner = pair.magnitude[:, None] * inner / inner.norm(dim=1, keepdim=True)
            want = want + weight * (inner - own)
        found = (module.weight.T if turned else module.weight).double()
        assert (found - want).abs().max() <= max(1e-6, torch.finfo(dtype).eps) * want.abs().max(), path
        seen += 1
    assert seen > 4
    if dtype == torch.float32:
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-3, atol=2e-3)
    unmerge(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(ids).logits, adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_dora_merges_into_the_same_bits(
    tiny_llama: Callable, snapshot: Callable, ids: Tensor, dtype: torch.dtype
) -> None:
    model = tiny_llama(dtype=dtype)
    before, own = snapshot(model), model(ids).logits
    attach(model, LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    assert torch.equal(model(ids).logits, own)
    merge(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_disabled_dora_is_the_base(tiny_llama: Callable, fill: Callable, ids: Tensor) -> None:
    model = tiny_llama()
    own = model(ids).logits
    attach(model, LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    fill(model)
    adapted = model(ids).logits
    assert not torch.allclose(adapted, own, atol=1e-3)
    with disabled(model):
        assert torch.equal(model(ids).logits, own)
    assert torch.equal(model(ids).logits, adapted)
    detach(model)
    assert torch.equal(model(ids).logits, own)


def test_dora_over_a_layer_that_another_adapter_replaces(tiny_llama: Callable, fill: Callable, ids: Tensor) -> None:
    model = tiny_llama()
    own = model.lm_head.weight.detach().double()
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=["lm_head"], use_dora=True), "dora")
    attach(model, LoraConfig(target_modules=[], modules_to_save=["lm_head"]), "whole")
    fill(model, "dora"), fill(model, "whole")
    activate(model, ["dora", "whole"])
    pair = model.lm_head.lora["dora"]
    inner = own + 1.5 * pair.lora_B.double() @ pair.lora_A.double()
    update = pair.magnitude.double()[:, None] * inner / inner.norm(dim=1, keepdim=True) - own
    want = model.lm_head.replacements["whole"].weight.double() + update
    x = torch.randn(5, 48)
    torch.testing.assert_close(model.lm_head(x).double(), x.double() @ want.T, rtol=1e-4, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model.lm_head.weight.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"], TARGETS])
def test_merged_and_unmerged_compute_the_same_and_never_twice(
    tiny_llama: Callable, ids: Tensor, fill: Callable, dense_twin: Callable, tied: bool, targets: list[str]
) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    fill(model)
    want = dense_twin(base, model, 1.5)(ids).logits
    torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-3, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-3, atol=1e-3)


def test_merge_twice_merges_once(tiny_llama: Callable, ids: Tensor, fill: Callable, snapshot: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=TARGETS))
    fill(model)
    merge(model)
    once, objects = snapshot(model), [id(p) for p in model.parameters()]
    merge(model)
    assert all(torch.equal(tensor, once[key]) for key, tensor in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == objects
    unmerge(model)
    assert not roster_of(model).is_merged


def test_merge_then_unmerge_is_bit_exact_a_hundred_times(tiny_llama: Callable, fill: Callable, snapshot: Callable) -> None:
    model = tiny_llama(dtype=torch.bfloat16, layers=1, tie_word_embeddings=True)
    attach(model, LoraConfig(r=4, target_modules=TARGETS))
    fill(model)
    before, objects = snapshot(model), [id(p) for p in model.parameters()]
    for _ in range(100):
        merge(model)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        unmerge(model)
    after = model.state_dict()
    assert list(after) == list(before)
    base = [key for key in before if before[key].dtype == torch.bfloat16]
    assert len(base) > 10
    assert all(torch.equal(after[key].view(torch.int16), before[key].view(torch.int16)) for key in base)
    assert [id(p) for p in model.parameters()] == objects


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", ["memory", "disk", "checkpoint"])
def test_every_way_of_keeping_is_bit_exact_and_ties_again(
    tiny_llama: Callable, ids: Tensor, fill: Callable, snapshot: Callable, tmp_path: Path, keep: str, dtype: torch.dtype
) -> None:
    model = tiny_llama(dtype=dtype, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = snapshot(model)
    attach(model, LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["model.norm"]))
    fill(model)
    adapted = model(ids).logits
    folder = {"memory": None, "disk": tmp_path, "checkpoint": tmp_path / "base"}[keep]
    for _ in range(2):
        merge(model, keep=keep, folder=folder)
        assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
        unmerge(model)
        assert torch.equal(model(ids).logits, adapted)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    detach(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    gc.collect()
    assert [entry.name for entry in tmp_path.iterdir()] == ["base"]


def test_keeping_nothing_frees_the_base_and_says_so_afterwards(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    attach(model, LoraConfig(target_modules=TARGETS))
    fill(model)
    merge(model, keep="nothing")
    merged = model(ids).logits
    for back in (unmerge, lambda model: list(base_parameters(model))):
        with pytest.raises(AdapterStateError, match=r"keep='nothing'.*Load the base again"):
            back(model)
    with pytest.raises(AdapterStateError, match="merged"):
        detach(model)
    assert torch.equal(model(ids).logits, merged)


def test_several_active_adapters_are_merged_together(tiny_llama: Callable, fill: Callable) -> None:
    model = tiny_llama()
    path = "model.layers.0.self_attn.q_proj"
    base = model.get_submodule(path).weight.detach().clone()
    for name, r in (("a", 4), ("b", 2), ("silent", 3)):
        attach(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj"]), name)
        fill(model, name)
    activate(model, {"a": 0.5, "b": -1.0})
    merge(model)
    want = base.double() + 0.5 * float32_delta(model, path, 2, "a").double() - float32_delta(model, path, 2, "b").double()
    torch.testing.assert_close(model.get_submodule(path).weight.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused_with_the_model_untouched(
    tiny_llama: Callable, fill: Callable, snapshot: Callable, bad: float
) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=TARGETS))
    fill(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora["default"].lora_B[3, 1] = bad
    before, objects = snapshot(model), [id(p) for p in model.parameters()]
    with pytest.raises(AdapterFormatError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        merge(model)
    assert [id(p) for p in model.parameters()] == objects
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)
    assert not roster_of(model).is_merged


def test_an_update_too_large_for_float16_is_refused(tiny_llama: Callable, fill: Callable) -> None:
    model = tiny_llama(dtype=torch.float16)
    attach(model, LoraConfig(r=4, target_modules=["q_proj"]))
    fill(model, size=300.0)
    with pytest.raises(AdapterFormatError, match=r"too large for torch\.float16"):
        merge(model)


def test_a_layer_with_a_forward_of_its_own_is_not_merged() -> None:
    class Clipped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-0.5, 0.5)

    model = nn.ModuleDict({"first": nn.Linear(7, 5), "second": Clipped(5, 3)})
    x = torch.randn(11, 5)
    before = model["second"](x)
    attach(model, LoraConfig(target_modules=["first", "second"]))
    assert torch.equal(model["second"](x), before)
    nn.init.normal_(model["second"].lora["default"].lora_B)
    pair = model["second"].lora["default"]
    torch.testing.assert_close(model["second"](x), before + x @ pair.lora_A.T @ pair.lora_B.T, rtol=1e-4, atol=1e-4)
    assert before.abs().max() <= 0.5
    weights = [id(p) for p in model.parameters()]
    with pytest.raises(AdapterStateError, match=r"second is a Clipped with a forward of its own"):
        merge(model)
    assert [id(p) for p in model.parameters()] == weights
    detach(model)
    assert type(model["second"]) is Clipped


def test_what_cannot_be_merged_now_says_why(tiny_llama: Callable) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterStateError, match="no adapter is attached"):
        merge(model)
    attach(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(AdapterStateError, match="inside a disabled"), disabled(model):
        merge(model)
    with pytest.raises(ConfigError, match=r"keep='disc' is not one of.*Did you mean 'disk'"):
        merge(model, keep="disc")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="folder has no effect with keep='memory'"):
        merge(model, folder="somewhere")
    with pytest.raises(AdapterStateError, match="attached to another module"):
        merge(model.model)
    activate(model, [])
    with pytest.raises(AdapterStateError, match="no adapter is active"):
        merge(model)
    activate(model, "default")
    merge(model)
    with pytest.raises(AdapterStateError, match="merged into the weights"):
        attach(model, LoraConfig(target_modules=["k_proj"]), "b")
    with pytest.raises(AdapterStateError, match="unmerge"):
        detach(model)


def test_unmerging_an_unmerged_model_does_nothing(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    objects = [id(p) for p in model.parameters()]
    unmerge(model)
    assert [id(p) for p in model.parameters()] == objects


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_base_parameters_are_those_from_before_the_merge(tiny_llama: Callable, fill: Callable, keep: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    before = [(name, parameter.detach().clone()) for name, parameter in model.named_parameters()]
    attach(model, LoraConfig(target_modules=TARGETS, modules_to_save=["model.norm"]))
    fill(model)
    merge(model, keep=keep)
    after = list(base_parameters(model))
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(after, before, strict=True))


# --- failures in the middle -------------------------------------------------------------------------------


def unchanged(model: nn.Module, objects: list[int]) -> bool:
    return [id(p) for p in model.parameters()] == objects and not roster_of(model).is_merged


def test_a_missing_folder_leaves_the_model_unchanged(tiny_llama: Callable, fill: Callable, tmp_path: Path) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=TARGETS))
    fill(model)
    objects = [id(p) for p in model.parameters()]
    with pytest.raises(StorageError, match="The model is unchanged"):
        merge(model, keep="disk", folder=tmp_path / "missing")
    with pytest.raises(AdapterStateError, match="needs the base's folder"):
        merge(model, keep="checkpoint")
    assert unchanged(model, objects)


def test_another_checkpoint_is_noticed_before_anything_changes(tiny_llama: Callable, fill: Callable, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    tiny_llama(layers=1).save_pretrained(tmp_path / "smaller")
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    fill(model)
    objects = [id(p) for p in model.parameters()]
    with pytest.raises(StorageError, match=r"no longer holds the original bytes of model\.layers\.0"):
        merge(model, keep="checkpoint", folder=tmp_path / "other")
    with pytest.raises(StorageError, match=r"no longer holds|holds no tensor"):
        merge(model, keep="checkpoint", folder=tmp_path / "smaller")
    assert unchanged(model, objects)


def test_originals_that_were_damaged_on_disk_are_not_put_back(
    tiny_llama: Callable, ids: Tensor, fill: Callable, tmp_path: Path
) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    fill(model)
    merge(model, keep="disk", folder=tmp_path)
    merged, objects = model(ids).logits, [id(p) for p in model.parameters()]
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match="no longer holds the original bytes"):
        unmerge(model)
    with pytest.raises(StorageError, match="no longer holds the original bytes"), disabled(model):
        pytest.fail("the block must not be entered")
    assert [id(p) for p in model.parameters()] == objects
    assert torch.equal(model(ids).logits, merged)
    files[1].write_bytes(whole)
    unmerge(model)
    assert not roster_of(model).is_merged


# --- copies of merged models ------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_merged_model_and_its_copy_unmerge_on_their_own(tiny_llama: Callable, ids: Tensor, fill: Callable, keep: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    attach(model, LoraConfig(target_modules=TARGETS))
    fill(model)
    adapted = model(ids).logits
    merge(model, keep=keep)
    merged, twin = model(ids).logits, copy.deepcopy(model)
    unmerge(model)
    assert torch.equal(model(ids).logits, adapted)
    assert torch.equal(twin(ids).logits, merged)
    del model
    gc.collect()
    unmerge(twin)
    assert torch.equal(twin(ids).logits, adapted)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight


def test_a_model_whose_originals_are_in_a_temporary_folder_is_not_pickled(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    assert isinstance(pickle.loads(pickle.dumps(model)), nn.Module)
    merge(model, keep="disk")
    with pytest.raises(AdapterStateError, match="temporary folder"):
        pickle.dumps(model)
