"""modules_to_save and bias: modules and biases that an adapter trains whole."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, adapter_parameters, attach, detach, disabled, merge, plan, unmerge
from luthier.core.config import LoraConfig


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [["model.norm"], ["lm_head", "model.norm"], ["embed_tokens"], ["mlp"]])
def test_a_saved_module_starts_as_the_base_and_is_trained_in_float32(
    tiny_llama: Callable, ids: Tensor, dtype: torch.dtype, saved: list[str]
) -> None:
    model = tiny_llama(dtype=dtype)
    with torch.no_grad():
        before = model(ids).logits
        planned = attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=saved))
        assert torch.equal(model(ids).logits, before)
    trained = [item for item in adapter_parameters(model) if item.role == "whole"]
    assert sum(item.parameter.numel() for item in trained) == sum(planned.saved.values())
    assert {item.parameter.dtype for item in trained} == {torch.float32}
    assert all(item.parameter.requires_grad for item in trained)
    model(ids, labels=ids).loss.backward()
    assert all(item.parameter.grad.dtype == torch.float32 for item in trained)


def test_a_trained_module_computes_disables_merges_and_detaches(tiny_llama: Callable, ids: Tensor, snapshot: Callable) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    base, before = copy.deepcopy(model), snapshot(model)
    base_logits = model(ids).logits
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "mlp"]))
    oracle = copy.deepcopy(base)
    with torch.no_grad():
        for item in adapter_parameters(model):
            if item.role == "whole":
                item.parameter.add_(torch.randn_like(item.parameter))
                oracle.get_parameter(f"{item.path}.{item.key}").copy_(item.parameter)
    want = oracle(ids).logits
    assert torch.equal(model(ids).logits, want)
    with disabled(model):
        assert torch.equal(model(ids).logits, base_logits)
    merge(model)
    assert torch.equal(model(ids).logits, want)
    assert torch.equal(model.lm_head.weight, oracle.lm_head.weight)
    with disabled(model):
        assert torch.equal(model(ids).logits, base_logits)
    unmerge(model)
    assert torch.equal(model(ids).logits, want)
    detach(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]


def test_masters_of_a_bfloat16_base_merge_to_their_rounding(tiny_llama: Callable, fill: Callable) -> None:
    model = tiny_llama(dtype=torch.bfloat16, tie_word_embeddings=False)
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    fill(model)
    master = model.lm_head.replacements["default"].weight
    assert master.dtype == torch.float32
    merge(model)
    assert torch.equal(model.lm_head.weight, master.detach().to(torch.bfloat16))


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_trained_where_asked(tiny_gpt2: Callable, ids: Tensor, fill: Callable, bias: str) -> None:
    model = tiny_gpt2()
    base = copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["c_attn"], bias=bias)
    planned = attach(model, config)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)
    own = {name: p.numel() for name, p in base.named_parameters() if name.endswith(".bias")}
    want = {"none": 0, "all": sum(own.values()), "lora_only": sum(n for name, n in own.items() if ".c_attn." in name)}[bias]
    pairs = sum(4 * sum(m.weight.shape) for path, m in base.named_modules() if path.endswith("c_attn"))
    assert planned.num_parameters == pairs + want
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pairs + want

    fill(model, size=0.2)
    oracle = copy.deepcopy(base).double()
    with torch.no_grad():
        for item in adapter_parameters(model):
            layer = oracle.get_submodule(item.path)
            if item.role == "lora_A":
                pair = model.get_submodule(item.path).lora["default"]
                layer.weight += (pair.lora_B.double() @ pair.lora_A.double()).T
            elif item.role == "bias" or item.key == "bias":
                layer.bias.copy_(item.parameter)
        want_logits = oracle(ids).logits
    torch.testing.assert_close(model(ids).logits.double(), want_logits, rtol=1e-3, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model(ids).logits.double(), want_logits, rtol=1e-3, atol=1e-3)
    unmerge(model)
    detach(model)
    assert torch.equal(model(ids).logits, base(ids).logits)


def test_biases_of_a_bfloat16_base_have_float32_masters(tiny_gpt2: Callable) -> None:
    model = tiny_gpt2(dtype=torch.bfloat16)
    attach(model, LoraConfig(target_modules=["c_attn"], bias="all"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_an_update_goes_on_top_of_another_adapters_replacement(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama(tie_word_embeddings=False)
    oracle = copy.deepcopy(model).double()
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), "whole")
    attach(model, LoraConfig(r=4, lora_alpha=4, target_modules=["lm_head"]), "pair")
    fill(model, "pair")
    with torch.no_grad():
        model.lm_head.replacements["whole"].weight.add_(1.0)
    activate(model, ["whole", "pair"])
    pair = model.lm_head.lora["pair"]
    oracle.lm_head.weight = nn.Parameter(oracle.lm_head.weight + 1.0 + pair.lora_B.double() @ pair.lora_A.double())
    want = oracle(ids).logits
    torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-3, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-3, atol=1e-3)


def test_a_copy_of_a_module_takes_no_adapters_along(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["down_proj"]), "inner")
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    planned = plan(model, config)
    base_size = sum(p.numel() for p in tiny_llama().model.layers[0].mlp.parameters())
    assert planned.saved == {"model.layers.0.mlp": base_size, "model.layers.1.mlp": base_size}
    attach(model, config, "outer")
    copied = model.model.layers[0].mlp.replacements["outer"]
    assert [type(module).__name__ for module in copied.modules()] == [
        type(module).__name__ for module in tiny_llama().model.layers[0].mlp.modules()
    ]
    detach(model, "inner")
    detach(model, "outer")
    assert list(model.state_dict()) == list(tiny_llama().state_dict())


def test_hooks_of_a_replaced_module_run_once(tiny_llama: Callable, ids: Tensor) -> None:
    model, calls = tiny_llama(), []
    model.model.norm.register_forward_hook(lambda *_: calls.append("after"))
    model.model.norm.register_forward_pre_hook(lambda *_: calls.append("before"))
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]))
    model(ids)
    assert calls == ["before", "after"]


def test_weights_tied_inside_a_saved_module_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    model = nn.ModuleDict({"block": Tied().bfloat16(), "other": nn.Linear(5, 5)})
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    before = model["block"](x)
    planned = attach(model, LoraConfig(target_modules=["other"], modules_to_save=["block"]))
    assert planned.saved == {"block": 25}
    copied = model["block"].replacements["default"]
    assert copied.one.weight is copied.two.weight
    assert torch.equal(model["block"](x), before)
    with torch.no_grad():
        copied.one.weight.add_(0.5)
    weight = copied.one.weight.detach().bfloat16()
    want = (x @ weight.T) @ weight.T
    assert torch.equal(model["block"](x), want)
    merge(model)
    assert torch.equal(model["block"](x), want)
    unmerge(model)
    detach(model)
    assert torch.equal(model["block"](x), before)
    assert model["block"].one.weight is model["block"].two.weight


def test_a_table_trained_for_both_its_users_moves_once_a_step(tiny_llama: Callable, ids: Tensor) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    attach(model, LoraConfig(target_modules=[], modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    (item,) = adapter_parameters(model)
    before = item.parameter.detach().clone()
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD([each.parameter for each in adapter_parameters(model)], lr=0.5).step()
    torch.testing.assert_close(item.parameter.detach(), before - 0.5 * item.parameter.grad)
