"""activate() and disabled(): which adapters a model uses now."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, attach, disabled, merge, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError


@pytest.fixture
def base_logits(tiny_llama: Callable, ids: Tensor) -> Tensor:
    return tiny_llama()(ids).logits


@pytest.fixture
def model(tiny_llama: Callable, fill: Callable) -> nn.Module:
    """A model with two trained-looking adapters, the first active and with a whole module of its own."""
    model = tiny_llama()
    attach(model, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["model.norm"]), "a")
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), "b")
    fill(model, "a")
    fill(model, "b")
    return model


def test_disabled_is_the_base_and_ends_as_it_began(model: nn.Module, ids: Tensor, base_logits: Tensor) -> None:
    adapted = model(ids).logits
    with disabled(model) as same:
        assert same is model
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, adapted)
    assert not torch.equal(adapted, base_logits)


def test_disabled_blocks_nest(model: nn.Module, ids: Tensor, base_logits: Tensor) -> None:
    adapted = model(ids).logits
    with disabled(model):
        with disabled(model):
            assert torch.equal(model(ids).logits, base_logits)
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, adapted)


@pytest.mark.parametrize("merged", [False, True])
def test_an_exception_inside_the_block_ends_it(model: nn.Module, ids: Tensor, merged: bool) -> None:
    if merged:
        merge(model)
    adapted = model(ids).logits
    with pytest.raises(ZeroDivisionError), disabled(model), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(model(ids).logits, adapted)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_merged_model_is_its_base_within_the_block(model: nn.Module, ids: Tensor, base_logits: Tensor, keep: str) -> None:
    merge(model, keep=keep)
    merged = model(ids).logits
    weights = [id(p) for p in model.parameters()]
    with disabled(model):
        assert torch.equal(model(ids).logits, base_logits)
        with disabled(model):
            assert torch.equal(model(ids).logits, base_logits)
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, merged)
    assert [id(p) for p in model.parameters()] == weights


def test_unmerging_inside_the_block_is_kept(model: nn.Module, ids: Tensor, base_logits: Tensor) -> None:
    adapted = model(ids).logits
    merge(model)
    with disabled(model):
        unmerge(model)
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, adapted)


def test_a_merge_that_kept_nothing_cannot_be_disabled_and_stays_as_it_is(model: nn.Module, ids: Tensor) -> None:
    merge(model, keep="nothing")
    merged = model(ids).logits
    for _ in range(2):
        with pytest.raises(AdapterStateError, match="keep='nothing'"), disabled(model):
            pytest.fail("the block must not be entered")
        assert torch.equal(model(ids).logits, merged)


def test_without_adapters_disabled_does_nothing(tiny_llama: Callable, ids: Tensor, base_logits: Tensor) -> None:
    model = tiny_llama()
    with disabled(model):
        assert torch.equal(model(ids).logits, base_logits)


def test_activating_inside_a_block_takes_effect_after_it(model: nn.Module, ids: Tensor, base_logits: Tensor) -> None:
    activate(model, "b")
    only_b = model(ids).logits
    activate(model, "a")
    with disabled(model):
        activate(model, "b")
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, only_b)


def test_an_empty_list_silences_all(model: nn.Module, ids: Tensor, base_logits: Tensor) -> None:
    activate(model, [])
    assert torch.equal(model(ids).logits, base_logits)


def test_a_name_that_is_not_there_changes_nothing(model: nn.Module, ids: Tensor) -> None:
    before = model(ids).logits
    with pytest.raises(AdapterStateError, match="no adapter 'c'"):
        activate(model, ["b", "c"])
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_must_be_finite(model: nn.Module, weight: float) -> None:
    with pytest.raises(AdapterStateError, match="finite"):
        activate(model, {"b": weight})


def test_a_merged_model_does_not_switch(model: nn.Module) -> None:
    merge(model)
    with pytest.raises(AdapterStateError, match=r"\['a'\] are merged"):
        activate(model, "b")


def test_two_adapters_cannot_replace_one_module(model: nn.Module) -> None:
    attach(model, LoraConfig(target_modules=["v_proj"], modules_to_save=["model.norm"]), "c")
    activate(model, ["b", "c"])
    with pytest.raises(AdapterStateError, match=r"\['a', 'c'\] each bring their own model.norm"):
        activate(model, ["a", "c"])


def test_a_replacement_has_no_half_strength(model: nn.Module) -> None:
    with pytest.raises(AdapterStateError, match=r"replaces model.norm whole, so its weight can only be 1.0"):
        activate(model, {"a": 0.5})


def test_an_adapter_that_would_be_hidden_in_a_replaced_module_is_refused(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["down_proj"]), "inner")
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"]), "outer")
    activate(model, "outer")
    with pytest.raises(AdapterStateError, match=r"'outer' replaces model.layers.0.mlp whole, which would hide.*'inner'"):
        activate(model, ["inner", "outer"])
