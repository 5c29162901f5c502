"""RankAllocator and drop_masked() on a live model: what moves, what is kept, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import adapter_parameters, attach, detach, merge, plan, roster_of, unmerge
from luthier.adapt.ranks import RankAllocator, adalora_pairs, drop_masked, live_ranks
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterStateError, ConfigError, TargetError

CONFIG = {"init_r": 3, "target_r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "total_step": 8, "tfinal": 2}


def trained(model: nn.Module, ids: Tensor, steps: int, ranks: RankAllocator, first: int = 1) -> None:
    optimizer = torch.optim.SGD([item.parameter for item in adapter_parameters(model)], lr=0.5)
    for step in range(first, first + steps):
        (model(input_ids=ids, labels=ids).loss + ranks.penalty()).backward()
        optimizer.step()
        ranks.update(step)
        optimizer.zero_grad()


def state_of(model: nn.Module) -> list[Tensor]:
    return [item.parameter.detach().clone() for item in adapter_parameters(model)]


def test_a_loop_of_ones_own_ends_at_the_budget(tiny_llama: Callable[..., nn.Module], ids: Tensor) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(**CONFIG))
    trained(model, ids, 8, RankAllocator(model))
    assert sum(live_ranks(model).values()) == 2 * 4
    before = model(ids).logits
    assert drop_masked(model) == live_ranks(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    assert sum(item.parameter.shape[0] for item in adapter_parameters(model) if item.role == "lora_E") == 2 * 4


def test_a_restored_allocator_goes_on_with_the_same_bits(tiny_llama: Callable[..., nn.Module], ids: Tensor) -> None:
    for stop in range(1, 8):
        whole, cut = tiny_llama(), tiny_llama()
        for model in (whole, cut):
            torch.manual_seed(0)
            attach(model, AdaLoraConfig(**CONFIG))
        trained(whole, ids, 8, RankAllocator(whole))
        ranks = RankAllocator(cut)
        trained(cut, ids, stop, ranks)
        again = RankAllocator(cut)
        again.restore(ranks.state())
        trained(cut, ids, 8 - stop, again, first=stop + 1)
        assert all(torch.equal(a, b) for a, b in zip(state_of(whole), state_of(cut), strict=True)), stop


def test_a_pruned_adapter_is_pruned_again(tiny_llama: Callable[..., nn.Module], ids: Tensor, fill: Callable[..., None]) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(**CONFIG))
    fill(model)
    path, pair = next(adalora_pairs(model))
    pair.lora_E.data[1] = 0
    assert drop_masked(model)[path] == 2
    pair.lora_E.data[0] = 0
    assert drop_masked(model)[path] == 1
    config = roster_of(model).configs["default"]
    assert isinstance(config, AdaLoraConfig)
    assert config.rank_pattern[f"{path}.lora_E"] == [False, False, True]
    ranks = RankAllocator(model)
    assert ranks.first_budget == 1 + 3 * 3


def test_merging_with_ranks_of_zero_is_the_forward_pass_and_can_be_undone(
    tiny_llama: Callable[..., nn.Module], ids: Tensor, fill: Callable[..., None], snapshot: Callable[..., dict[str, Tensor]]
) -> None:
    model = tiny_llama()
    base = snapshot(model)
    attach(model, AdaLoraConfig(**CONFIG))
    fill(model)
    next(adalora_pairs(model))[1].lora_E.data.zero_()
    assert 0 in drop_masked(model).values()
    before = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    unmerge(model)
    detach(model)
    assert all(torch.equal(tensor, base[key]) for key, tensor in model.state_dict().items())


def test_a_layer_without_gradients_loses_its_ranks(tiny_llama: Callable[..., nn.Module], ids: Tensor) -> None:
    """As an expert that nobody asks: PEFT fails on it."""
    model = tiny_llama()
    attach(model, AdaLoraConfig(**CONFIG, init_lora_weights=False))
    path, pair = next(adalora_pairs(model))
    for parameter in pair.parameters():
        parameter.requires_grad_(False)
    ranks = RankAllocator(model)
    trained(model, ids, 6, ranks)
    assert live_ranks(model)[path] == 0


def test_a_fresh_adapter_is_not_dropped(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(**CONFIG))
    with pytest.raises(AdapterStateError, match="every triplet of adapter 'default' is zero"):
        drop_masked(model)
    assert all(pair.r == 3 for _, pair in adalora_pairs(model))


def test_an_adapter_of_another_method_is_refused(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    for call in (RankAllocator, drop_masked):
        with pytest.raises(AdapterStateError, match="no AdaLoRA adapter; attach it with an AdaLoraConfig"):
            call(model)


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"total_step": None}, "set total_step"), ({"total_step": 1, "tfinal": 0}, "in 1 optimiser steps .* it needs 2 at least")],
)
def test_a_schedule_that_cannot_be_is_refused(tiny_llama: Callable[..., nn.Module], changed: dict, told: str) -> None:
    model = tiny_llama()
    attach(model, AdaLoraConfig(**(CONFIG | changed)))
    with pytest.raises(ConfigError, match=told):
        RankAllocator(model)


def test_only_linear_layers_take_triplets(tiny_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(TargetError, match="is a Embedding; AdaLoRA adapts Linear and Conv1D layers"):
        plan(tiny_llama(), AdaLoraConfig(target_modules=["embed_tokens"]))


def test_the_plan_counts_what_is_attached(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    planned = attach(model, AdaLoraConfig(**CONFIG))
    assert planned.num_parameters == sum(item.parameter.numel() for item in adapter_parameters(model))
    assert "2 x q_proj           48 -> 48, r=3: 291 each" in str(planned)  # 3 * (48 + 48 + 1)
