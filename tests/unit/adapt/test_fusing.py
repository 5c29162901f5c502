"""Fused models beside the same models unfused: packed documents, plain use, and what must be left alone."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from luthier.adapt import activate, attach, detach
from luthier.adapt.fusing import Fusion, decoder_of, fuse, fusion_of, unfuse
from luthier.core.config import LoraConfig
from luthier.layers.fused import FusedModule
from luthier.ops.documents import Documents

LENGTHS = (9, 6, 6, 1, 3)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Return a random model of two layers, with random numbers in norms and biases too."""
    family, own = KINDS.get(kind, (kind, {}))
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 48,
        "intermediate_size": 75,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **own, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3 if "norm" in name else 0.1)
    return model.to(dtype).eval().requires_grad_(False)


def adapted(model: nn.Module, fill: Callable, **settings: Any) -> nn.Module:
    attach(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": "all-linear", **settings}))
    # Larger ones make scores so sharp that float32 itself is off by more than 1e-5.
    fill(model, size=0.1)
    return model


def classes_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def ids_of(lengths: Sequence[int]) -> Tensor:
    return torch.randint(3, 211, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))


def apart(model: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The last hidden states of each document, given to the model alone."""
    decoder = decoder_of(model)
    return torch.cat([decoder(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(lengths, 1)], 1)


def packed(model: nn.Module, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same from one packed row; the mask fits nowhere, so whoever read it would fail."""
    documents = Documents(tuple(lengths))
    mask = torch.empty(1, 1, 0, 0)
    return (
        decoder_of(model)(
            input_ids=ids, position_ids=documents.position_ids, attention_mask=mask, use_cache=False, documents=documents
        )
    ).last_hidden_state


def learn(model: nn.Module, hidden: Tensor) -> list[Tensor]:
    """Return logits, hidden states and the gradients of all that learns, for one upstream gradient."""
    logits = model.get_output_embeddings()(hidden)
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(6)).to(logits.dtype)
    return [logits, hidden, *torch.autograd.grad(logits, [p for p in model.parameters() if p.requires_grad], upstream)]


def assert_all_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Compare in norm, relative to the size of each tensor."""
    for each, want in zip(found, wanted, strict=True):
        assert each.shape == want.shape and each.dtype == want.dtype
        assert float((each - want).detach().norm()) <= tolerance * float(want.detach().norm()) + 1e-30


# --- the same numbers ---------------------------------------------------------------------------------------------


@each_kind
def test_all_of_a_known_model_is_fused(kind: str) -> None:
    fusion = fuse(make(kind))
    assert (fusion.attentions, fusion.mlps, fusion.norms) == (2, 2, 9 if kind == "qwen3" else 5)
    assert fusion.packs and fusion.head_is_plain and fusion.reason == ""
    assert str(fusion) == f"fused: 2 attentions, 2 MLPs, {fusion.norms} norms"


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("first", ["attach", "fuse"])
def test_packed_documents_are_each_document_alone(fill: Callable, kind: str, dtype: torch.dtype, first: str) -> None:
    model = make(kind, dtype)
    if first == "fuse":
        fuse(model)
    adapted(model, fill).to(dtype)
    unfused, ids = copy.deepcopy(model), ids_of(LENGTHS)
    unfuse(unfused)
    if first == "attach":
        fuse(model)
    wanted = learn(unfused, apart(unfused, ids, LENGTHS))
    assert len(wanted) == 2 + 2 * 7 * 2
    assert_all_close(learn(model, packed(model, ids, LENGTHS)), wanted, TOLERANCE[dtype])


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_documents_without_adapters(kind: str, dtype: torch.dtype) -> None:
    model, ids = make(kind, dtype), ids_of(LENGTHS)
    want = apart(model, ids, LENGTHS)
    fuse(model)
    assert_all_close([packed(model, ids, LENGTHS)], [want], TOLERANCE[dtype])


@pytest.mark.parametrize("names", [["q_proj"], ["down_proj"], ["v_proj", "up_proj"], ["lm_head", "o_proj"]], ids=str)
def test_adapters_on_some_layers(fill: Callable, names: list[str]) -> None:
    model, ids = adapted(make("llama", torch.float64), fill, target_modules=names).double(), ids_of(LENGTHS)
    wanted = learn(model, apart(model, ids, LENGTHS))
    assert fuse(model).packs
    assert_all_close(learn(model, packed(model, ids, LENGTHS)), wanted, 1e-10)


def test_bfloat16_is_as_exact_as_the_unfused_model(fill: Callable) -> None:
    model, ids = adapted(make("llama"), fill), ids_of(LENGTHS)
    exact = copy.deepcopy(model).double()
    wanted = learn(exact, apart(exact, ids, LENGTHS))
    for name, parameter in model.named_parameters():
        if ".lora." not in name:
            parameter.data = parameter.data.bfloat16()
    plain = learn(model, apart(model, ids, LENGTHS))
    assert fuse(model).packs
    found = learn(model, packed(model, ids, LENGTHS))
    assert {gradient.dtype for gradient in found[2:]} == {torch.float32}
    errors = [
        sum(float(((a.double() - b).norm() / b.norm()).detach()) for a, b in zip(each, wanted, strict=True))
        for each in (found, plain)
    ]
    assert errors[0] <= 1.5 * errors[1]


def test_training_with_dropout_under_gradient_checkpointing(fill: Callable) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted(make("llama", torch.float64), fill, lora_dropout=0.3).double()
        with torch.no_grad():
            for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.3)
        fuse(model)
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it has another name from transformers 6 on
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(9)
        results.append(learn(model, packed(model, ids_of(LENGTHS), LENGTHS)))
    assert_all_close(results[1], results[0], 1e-12)


# --- used as any model is -----------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("with_adapter", [False, True])
def test_without_documents_it_is_the_model_it_was(fill: Callable, ids: Tensor, kind: str, with_adapter: bool) -> None:
    model = make(kind)
    if with_adapter:
        adapted(model, fill)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}

    def use() -> tuple[list[Tensor], list[Tensor]]:
        with torch.no_grad():
            cached = model(ids[:, :5], use_cache=True)
            rest = model(ids[:, 5:], past_key_values=cached.past_key_values, use_cache=True)
            logits = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 4:], cached.logits, rest.logits]
            tokens = [model.generate(ids, **settings), model.generate(ids, attention_mask=mask, **settings)]
        return logits, tokens

    wanted = use()
    fuse(model)
    found = use()
    assert_all_close(found[0], wanted[0], 1e-5)
    assert all(torch.equal(*pair) for pair in zip(found[1], wanted[1], strict=True))


def test_unused_model_outputs_still_come(ids: Tensor) -> None:
    model = make("llama", attn_implementation="eager")
    fuse(model)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2


def test_a_fused_model_under_autocast_can_learn(fill: Callable, ids: Tensor) -> None:
    model = adapted(make("llama"), fill, target_modules=["q_proj", "v_proj"])
    results = []
    for is_fused in (False, True):
        if is_fused:
            fuse(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids).logits.float().pow(2).mean()
        results.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
    assert_all_close(results[1], results[0], 0.1)


# --- fuse and unfuse ----------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("with_adapter", [False, True])
def test_unfuse_gives_back_the_very_classes(fill: Callable, kind: str, with_adapter: bool) -> None:
    model = make(kind)
    if with_adapter:
        adapted(model, fill)
    before, state = classes_of(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    fusion = fuse(model)
    assert fusion_of(model) is fusion
    assert classes_of(model) != before
    unfuse(model)
    assert classes_of(model) == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert str(fusion_of(model)).startswith("nothing fused") and not fusion_of(model).packs
    unfuse(model)
    assert classes_of(model) == before


def test_fusing_twice_is_fusing_once(ids: Tensor) -> None:
    model = make("llama")
    before, first = classes_of(model), fuse(model)
    once = classes_of(model)
    assert fuse(model) == first
    assert classes_of(model) == once
    unfuse(model)
    assert classes_of(model) == before


def test_fusing_leaves_random_state_modes_and_gradient_flags(fill: Callable) -> None:
    model = adapted(make("llama"), fill, lora_dropout=0.5).train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_()
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(77)
    state = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.is_grad_enabled()
    unfuse(model)
    assert [module.training for module in model.modules()] == modes


def test_a_copy_of_a_fused_model_works_by_itself(fill: Callable) -> None:
    model, ids = adapted(make("llama"), fill), ids_of(LENGTHS)
    fuse(model)
    want = packed(model, ids, LENGTHS)
    twin = copy.deepcopy(model)
    assert fusion_of(twin) == fusion_of(model) and classes_of(twin) == classes_of(model)
    unfuse(model)
    assert torch.equal(packed(twin, ids, LENGTHS), want)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(packed(twin, ids, LENGTHS), want)
    detach(twin)
    unfuse(twin)
    assert not any(isinstance(module, FusedModule) for module in twin.modules())


def test_attach_activate_and_detach_while_fused(fill: Callable) -> None:
    model, ids = make("llama"), ids_of(LENGTHS)
    before = classes_of(model)
    fuse(model)
    base = packed(model, ids, LENGTHS)
    adapted(model, fill)
    assert not torch.equal(packed(model, ids, LENGTHS), base)
    activate(model, [])
    torch.testing.assert_close(packed(model, ids, LENGTHS), base)
    detach(model)
    assert torch.equal(packed(model, ids, LENGTHS), base)
    unfuse(model)
    assert classes_of(model) == before


@pytest.mark.parametrize("path", ["model.layers.0.mlp", "model.layers.0.self_attn", "norm", "model.layers.1"])
@pytest.mark.parametrize("first", ["attach", "fuse"])
def test_modules_that_an_adapter_replaces_whole(fill: Callable, ids: Tensor, path: str, first: str) -> None:
    model = make("llama")
    before = classes_of(model)
    settings = {"target_modules": ["model.layers.0.mlp.up_proj"], "modules_to_save": [path]}
    if path == "model.layers.0.mlp":
        settings["target_modules"] = ["model.layers.1.mlp.up_proj"]
    twin = adapted(copy.deepcopy(model), fill, **settings)
    if first == "fuse":
        fuse(model)
    attach(model, LoraConfig(r=3, lora_alpha=6, **settings))
    model.load_state_dict(twin.state_dict())
    if first == "attach":
        fuse(model)
    assert_all_close([model(ids).logits], [twin(ids).logits], 1e-5)
    unfuse(model)
    assert_all_close([model(ids).logits], [twin(ids).logits], 1e-5)
    assert classes_of(model) == classes_of(twin)
    detach(model)
    assert classes_of(model) == before


# --- what is left alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Phi3"])
def test_a_model_that_is_not_known_is_left_alone(family: str, ids: Tensor) -> None:
    model = make(family, **({"head_dim": 8} if family.startswith("Gemma") else {}))
    before, want = classes_of(model), model(ids).logits
    fusion = fuse(model)
    assert (fusion.attentions, fusion.mlps, fusion.norms, fusion.packs) == (0, 0, 0, False)
    assert "model type" in str(fusion) and str(fusion).startswith("nothing fused")
    assert classes_of(model) == before
    assert torch.equal(model(ids).logits, want)


def test_gpt2_and_what_is_no_transformers_model_are_left_alone(tiny_gpt2: Callable) -> None:
    model = tiny_gpt2()
    before = classes_of(model)
    assert fuse(model).reason.startswith("model type 'gpt2'")
    assert classes_of(model) == before
    assert fuse(nn.Linear(3, 3)) == Fusion(reason="it is no transformers decoder")


def swap(model: nn.Module, path: str, cls: type) -> None:
    model.get_submodule(path).__class__ = cls


class GeluMLP(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


class FlatterAttention(LlamaAttention):
    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        self.scaling, scaling = 0.5 * self.scaling, self.scaling
        try:
            return LlamaAttention.forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)
        finally:
            self.scaling = scaling


class ShiftedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.1


@pytest.mark.parametrize(
    ("path", "cls", "what"),
    [
        ("model.layers.1.mlp", GeluMLP, "mlps"),
        ("model.layers.1.self_attn", FlatterAttention, "attentions"),
        ("model.layers.1.input_layernorm", ShiftedRMSNorm, "norms"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_module_with_a_formula_of_its_own_is_not_fused(
    path: str, cls: type, what: str, dtype: torch.dtype, ids: Tensor
) -> None:
    model = make("llama", dtype)
    for part in ("q_proj", "k_proj"):  # attention that is nearly even hides a scale
        model.model.layers[1].self_attn.get_submodule(part).weight.data.mul_(20)
    whole = fuse(model)
    unfuse(model)
    swap(model, path, cls)
    want = model(ids).logits
    fusion = fuse(model)
    assert type(model.get_submodule(path)) is cls
    assert getattr(fusion, what) == getattr(whole, what) - 1
    assert fusion.packs == (what != "attentions")
    if dtype == torch.float32:
        assert_all_close([model(ids).logits], [want], 1e-5)


@pytest.mark.parametrize(("path", "cls"), [("model.layers.1.mlp", GeluMLP), ("model.layers.1.input_layernorm", ShiftedRMSNorm)])
def test_a_formula_of_its_own_is_found_while_the_base_is_not_yet_frozen(path: str, cls: type, ids: Tensor) -> None:
    model = make("llama").requires_grad_(True)
    swap(model, path, cls)
    want = model(ids).logits.detach()
    fuse(model)
    attach(model, LoraConfig(r=3, target_modules=["q_proj"]))  # its B is zero; the base is frozen from here on
    assert_all_close([model(ids).logits], [want], 1e-5)


def test_an_mlp_with_another_activation_is_not_fused() -> None:
    fusion = fuse(make("llama", hidden_act="gelu"))
    assert (fusion.mlps, fusion.attentions, fusion.norms, fusion.packs) == (0, 2, 5, True)


def hook_forward(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, given, output: None)


def hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, given: None)


def hook_backward(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, dx, dy: None)


def hook_before_backward(module: nn.Module) -> None:
    module.register_full_backward_pre_hook(lambda module, dy: None)


@pytest.mark.parametrize("hook", [hook_forward, hook_before, hook_backward, hook_before_backward])
@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("layers.0.mlp", "mlps"),
        ("layers.0.mlp.down_proj", "mlps"),
        ("layers.0.self_attn.k_proj", "attentions"),
        ("norm", "norms"),
    ],
)
def test_a_module_that_is_hooked_is_not_fused(hook: Callable[[nn.Module], None], path: str, what: str) -> None:
    model = make("llama")
    hook(model.model.get_submodule(path))
    fusion = fuse(model)
    assert getattr(fusion, what) == {"mlps": 1, "attentions": 1, "norms": 4}[what]
    assert fusion.packs == (what != "attentions")


def test_attention_with_dropout_is_not_fused() -> None:
    fusion = fuse(make("llama", attention_dropout=0.1))
    assert (fusion.attentions, fusion.packs, fusion.mlps) == (0, False, 2)
    assert "padded" in fusion.reason


# --- windows and heads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "settings", "longest"),
    [
        ("Llama", {}, None),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {"sliding_window": 4}, 4),
        ("Qwen2", {"sliding_window": 4, "use_sliding_window": False}, None),
        ("Qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}, 4),
        ("Qwen3", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}, 4),
    ],
)
def test_a_sliding_window_limits_the_length_of_documents(family: str, settings: dict[str, Any], longest: int | None) -> None:
    model, length = make(family, torch.float64, **settings), longest or 12
    fusion = fuse(model)
    assert fusion.packs and fusion.longest == longest
    ids = ids_of((length, length))
    want = packed(model, ids, (length, length))
    unfuse(model)
    assert_all_close([apart(model, ids, (length, length))], [want], 1e-10)


@pytest.mark.parametrize(
    ("family", "settings", "is_plain"),
    [
        ("Llama", {}, True),
        ("Qwen2", {"tie_word_embeddings": True}, True),
        ("Gemma", {"head_dim": 8}, True),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 30.0}, False),
        ("Gemma2", {"head_dim": 8, "final_logit_softcapping": None}, True),
        ("Cohere", {"logit_scale": 0.0625}, False),
        ("Granite", {"logits_scaling": 8.0}, False),
    ],
)
def test_whether_the_head_is_plain(fill: Callable, family: str, settings: dict[str, Any], is_plain: bool) -> None:
    model = make(family, **settings)
    assert fuse(model).head_is_plain == is_plain
    if family == "Llama":
        adapted(model, fill, target_modules=["lm_head", "q_proj"])
        assert fuse(model).head_is_plain
