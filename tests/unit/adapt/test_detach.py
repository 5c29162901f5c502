"""detach(): the base comes back bit for bit, in its classes, names and flags."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, adapter_parameters, attach, detach, disabled, roster_of
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.layers.base import AdaptedModule


def train(model: nn.Module, ids: Tensor, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([item.parameter for item in adapter_parameters(model)], lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_training_detach_gives_the_base_back(
    tiny_llama: Callable, ids: Tensor, snapshot: Callable, tied: bool, dtype: torch.dtype
) -> None:
    model = tiny_llama(tie_word_embeddings=tied, dtype=dtype)
    model.model.norm.weight.requires_grad_(False)
    before, logits = snapshot(model), model(ids).logits.detach()
    objects = [id(parameter) for parameter in model.parameters()]
    classes = [type(module) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}

    targets = ["q_proj", "down_proj", "embed_tokens", "lm_head"]
    attach(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["model.norm"], lora_dropout=0.1))
    train(model, ids)
    assert (model(ids).logits.detach() - logits).abs().max() > 0.01
    detach(model)

    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [id(parameter) for parameter in model.parameters()] == objects
    assert [type(module) for module in model.modules()] == classes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes
    assert torch.equal(model(ids).logits, logits)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_detaching_one_of_several_leaves_the_others(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj", "k_proj"]), "a")
    attach(model, LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["model.norm"]), "b")
    fill(model, "a")
    fill(model, "b")
    activate(model, "b")
    want = model(ids).logits
    detach(model, "a")
    assert torch.equal(model(ids).logits, want)
    assert list(roster_of(model).configs) == ["b"]
    layer = model.model.layers[0].self_attn
    assert type(layer.k_proj) is nn.Linear
    assert isinstance(layer.q_proj, AdaptedModule)
    assert list(layer.q_proj.lora) == ["b"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".b." not in name)
    detach(model, "b")
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())


def test_detaching_the_active_adapter_leaves_the_base(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama()
    base = model(ids).logits
    attach(model, LoraConfig(target_modules=["q_proj"]), "a")
    attach(model, LoraConfig(target_modules=["q_proj"]), "b")
    fill(model, "a")
    fill(model, "b")
    detach(model, "a")
    assert torch.equal(model(ids).logits, base)


def test_attach_and_detach_many_times(tiny_llama: Callable, ids: Tensor) -> None:
    model = tiny_llama()
    base, classes = model(ids).logits, {type(module) for module in model.modules()}
    for _ in range(5):
        attach(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        assert not torch.equal(model(ids).logits, base)
        detach(model)
        assert torch.equal(model(ids).logits, base)
    assert {type(module) for module in model.modules()} == classes


def test_save_pretrained_works_again(tiny_llama: Callable, tmp_path) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    detach(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


def test_without_adapters_there_is_nothing_to_detach(tiny_llama: Callable) -> None:
    with pytest.raises(AdapterStateError, match="no adapter is attached"):
        detach(tiny_llama())


def test_an_unknown_name_comes_with_near_misses(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]), "sql-v3")
    with pytest.raises(AdapterStateError, match=r"no adapter 'sql-v2'.*Did you mean 'sql-v3'"):
        detach(model, "sql-v2")


def test_a_part_cannot_be_detached_from_what_was_attached_as_a_whole(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(AdapterStateError, match="attached to another module"):
        detach(model.model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, AdaptedModule)
    detach(model)


def test_a_layer_whose_class_was_changed_again_is_not_detached(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]))
    layer = model.model.layers[1].self_attn.q_proj
    adapted = type(layer)
    layer.__class__ = type("Sharded", (adapted,), {})  # as FSDP2's fully_shard does
    with pytest.raises(AdapterStateError, match=r"class of model\.layers\.1\.self_attn\.q_proj"):
        detach(model)
    assert isinstance(model.model.layers[0].self_attn.q_proj, AdaptedModule)
    layer.__class__ = adapted
    detach(model)
    assert type(layer) is nn.Linear


def test_detaching_inside_a_disabled_block(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama()
    base = model(ids).logits
    attach(model, LoraConfig(target_modules=["q_proj"]))
    fill(model)
    with disabled(model):
        detach(model)
    assert torch.equal(model(ids).logits, base)
