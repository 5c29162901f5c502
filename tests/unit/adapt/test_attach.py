"""attach(): what changes (nothing, at first), what is added, and what the adapted model computes."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt import activate, adapter_parameters, attach, base_parameters, plan, roster_of
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError
from luthier.layers.base import AdaptedModule

GPT2_ALL = ["c_attn", "c_proj", "c_fc"]
LLAMA_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(params=["llama", "llama-tied", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_llama: Callable, tiny_gpt2: Callable) -> nn.Module:
    """A Llama with its own head, one with tied embeddings, and a GPT-2 (Conv1D, tied)."""
    return {
        "llama": lambda: tiny_llama(tie_word_embeddings=False),
        "llama-tied": lambda: tiny_llama(tie_word_embeddings=True),
        "gpt2": tiny_gpt2,
    }[request.param]()


def everything(model: nn.Module) -> list[str]:
    """Name every layer that can be adapted: linear layers, tables and the head."""
    return ["embed_tokens", "lm_head", *LLAMA_ALL] if hasattr(model, "model") else [*GPT2_ALL, "wte", "wpe", "lm_head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_changes_nothing(model: nn.Module, ids: Tensor, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    with torch.no_grad():
        before = model(ids).logits
        attach(model, LoraConfig(r=3, lora_alpha=7, target_modules=everything(model)))
        after = model(ids).logits
    assert torch.equal(after, before)


def _channels_first(rows: int) -> Tensor:
    return torch.randn(rows, 3, 5, 4)


def _vectors(rows: int) -> Tensor:
    return torch.randn(rows, 48)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "Linear": (lambda: nn.Linear(48, 40), _vectors),
    "Linear without bias": (lambda: nn.Linear(48, 40, bias=False), _vectors),
    "Conv1D": (lambda: Conv1D(40, 48), _vectors),
    "Conv1D, small": (lambda: Conv1D(7, 48), _vectors),
    "Embedding": (lambda: nn.Embedding(30, 40), lambda rows: torch.randint(0, 30, (rows,))),
    "Conv2d": (lambda: nn.Conv2d(3, 6, 3, padding=1), _channels_first),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_fresh_adapter_changes_no_bit_whatever_the_number_of_rows(kind: str, dtype: torch.dtype, training: bool) -> None:
    """The fast path adds B A into the weight from some number of rows on, and the product must stay the base's even then."""
    make_layer, make_rows = LAYERS[kind]
    holder = nn.ModuleDict({"layer": make_layer()}).to(dtype).train(training)
    inputs = [make_rows(rows) for rows in (*range(1, 70), 128, 300)]
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    before = [holder["layer"](x) for x in inputs]
    attach(holder, LoraConfig(r=4, target_modules=["layer"]))
    changed = [len(x) for x, y in zip(inputs, before, strict=True) if not torch.equal(holder["layer"](x), y)]
    assert changed == []


def test_base_names_classes_and_topology_stay(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shape = [(path, type(module)) for path, module in model.named_modules()]
    objects = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    attach(model, LoraConfig(target_modules=everything(model)))
    own = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False) if ".lora." not in name}
    assert list(own) == names
    assert own == objects
    modules = dict(model.named_modules())
    for path, kind in shape:
        assert isinstance(modules[path], kind)
    added = [path for path in modules if path not in dict(shape)]
    assert added
    assert all(".lora" in path or ".replacements" in path for path in added)


def test_only_the_adapter_is_trained(model: nn.Module) -> None:
    planned = attach(model, LoraConfig(r=5, target_modules=everything(model)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora.default." in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == planned.num_parameters
    assert {id(item.parameter) for item in adapter_parameters(model)} == {id(p) for p in trained.values()}
    assert {p.dtype for p in trained.values()} == {torch.float32}


@pytest.mark.parametrize(("r", "lora_alpha", "use_rslora"), [(1, 3, False), (4, 6, False), (16, 8, True)])
def test_adapted_model_computes_what_dense_weights_compute(
    model: nn.Module, ids: Tensor, fill: Callable, dense_twin: Callable, r: int, lora_alpha: float, use_rslora: bool
) -> None:
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=r, lora_alpha=lora_alpha, use_rslora=use_rslora, target_modules=everything(model)))
    fill(model, size=0.1)
    scaling = lora_alpha / (r**0.5 if use_rslora else r)
    with torch.no_grad():
        got, want = model(ids).logits, dense_twin(base, model, scaling)(ids).logits
        unadapted = base(ids).logits
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)
    assert (want - unadapted).abs().max() > 0.05, "the adapter must make a difference that the comparison can see"


def test_several_adapters_add_up_with_their_weights(
    tiny_llama: Callable, ids: Tensor, fill: Callable, dense_twin: Callable
) -> None:
    model = tiny_llama()
    base = copy.deepcopy(model)
    attach(model, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "embed_tokens"]), "a")
    attach(model, LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]), "b")
    fill(model, "a")
    fill(model, "b")
    for given, weights in [("a", {"a": 1.0}), (["b"], {"b": 1.0}), (["a", "b"], {"a": 1, "b": 1}), ({"a": 0.5, "b": -2}, None)]:
        activate(model, given)
        want = dense_twin(base, model, 1.0, weights or given)(ids).logits
        torch.testing.assert_close(model(ids).logits.double(), want, rtol=1e-3, atol=1e-3)


def test_the_first_adapter_is_active_and_later_ones_stay_silent(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]), "a")
    fill(model, "a")
    before = model(ids).logits
    attach(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "b")
    assert torch.equal(model(ids).logits, before)
    assert roster_of(model).active == {"a": 1.0}
    activate(model, [])
    attach(model, LoraConfig(target_modules=["q_proj"]), "c")
    assert roster_of(model).active == {}


def test_rank_and_alpha_patterns_reach_their_layers(tiny_llama: Callable) -> None:
    model = tiny_llama()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2}, alpha_pattern={r"layers\.1\..*": 1}
    )
    attach(model, config)
    found = {
        path: (m.lora["default"].r, m.lora["default"].scaling)
        for path, m in model.named_modules()
        if isinstance(m, AdaptedModule)
    }
    assert found == {
        "model.layers.0.self_attn.q_proj": (4, 2.0),
        "model.layers.0.self_attn.v_proj": (2, 4.0),
        "model.layers.1.self_attn.q_proj": (4, 0.25),
        "model.layers.1.self_attn.v_proj": (2, 0.5),
    }


def test_one_seed_gives_one_adapter(tiny_llama: Callable) -> None:
    numbers = []
    for _ in range(2):
        model = tiny_llama()
        torch.manual_seed(11)
        attach(model, LoraConfig(target_modules="all-linear"))
        numbers.append([item.parameter for item in adapter_parameters(model)])
    assert all(torch.equal(one, two) for one, two in zip(*numbers, strict=True))


def test_a_pair_takes_the_training_mode_of_its_layer(tiny_llama: Callable) -> None:
    for training in (True, False):
        model = tiny_llama().train(training)
        attach(model, LoraConfig(target_modules=["q_proj"], lora_dropout=0.1, modules_to_save=["model.norm"]))
        assert {module.training for module in model.modules()} == {training}


def test_save_pretrained_is_refused_while_adapters_are_attached(tiny_llama: Callable, tmp_path) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]), "mine")
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(AdapterStateError, match=r"\['mine'\] are attached.*save_adapter"):
            each.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_failure_while_making_the_pairs_leaves_the_model_as_it_was(tiny_llama: Callable, snapshot: Callable) -> None:
    from luthier.adapt.attaching import install

    model = tiny_llama()
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    made = []

    def fail_at_the_third(planned, layer, device):
        made.append(layer)
        if len(made) == 3:
            raise MemoryError("no more")
        return torch.zeros(layer.r, layer.in_features), torch.zeros(layer.out_features, layer.r)

    with pytest.raises(MemoryError):
        install(model, plan(model, LoraConfig()), "default", fail_at_the_third)
    assert len(made) == 3
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert list(snapshot(model)) == list(before)
    assert "save_pretrained" not in vars(model)


def test_base_parameters_leave_the_adapters_out(model: nn.Module) -> None:
    before = [(name, tensor.data_ptr()) for name, tensor in model.named_parameters()]
    attach(
        model,
        LoraConfig(
            target_modules=everything(model),
            modules_to_save=["transformer.ln_f" if hasattr(model, "transformer") else "model.norm"],
        ),
    )
    assert [(name, tensor.data_ptr()) for name, tensor in base_parameters(model)] == before


def test_parts_of_one_model_cannot_be_adapted_one_by_one_and_used_as_a_whole(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model.model.layers[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="a part of this model only"):
        attach(model, LoraConfig(target_modules=["q_proj"]), "b")
    attach(model.model.layers[1], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(AdapterStateError, match="2 parts of this model one by one"):
        activate(model, [])


def test_an_adapter_name_can_be_used_once(tiny_llama: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"]), "a")
    with pytest.raises(AdapterStateError, match="already has an adapter 'a'"):
        attach(model, LoraConfig(target_modules=["q_proj"]), "a")


def test_a_whole_model_compiles_to_the_same_output(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama(layers=1)
    attach(model, LoraConfig(r=4, target_modules="all-linear"))
    fill(model)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(ids).logits, model(ids).logits)


def test_a_model_is_deep_copied_with_its_adapters(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], modules_to_save=["model.norm"]), "a")
    fill(model, "a")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids).logits, model(ids).logits)
    assert roster_of(twin) is not roster_of(model)
    assert len({id(m.roster) for m in twin.modules() if isinstance(m, AdaptedModule)}) == 1
    with_adapter = model(ids).logits
    activate(twin, [])
    assert torch.equal(model(ids).logits, with_adapter)


def test_gradient_checkpointing_trains_with_a_frozen_base(tiny_llama: Callable, ids: Tensor, fill: Callable) -> None:
    gradients, calls = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_llama(layers=1).train()
        attach(model, LoraConfig(r=4, target_modules="all-linear"))
        fill(model)
        if checkpointing:
            # transformers renamed it and warns at the old name.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        count = []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, count=count: count.append(1))
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([item.parameter.grad for item in adapter_parameters(model)])
        calls.append(len(count))
    assert calls == [1, 2], "the block must have been run again for the backward pass"
    for one, two in zip(*gradients, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, two)
