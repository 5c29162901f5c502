"""plan(): it touches nothing, counts right, and refuses with all faults and near misses in one message."""

import copy
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from luthier.adapt import adapter_parameters, attach, detach, merge, plan, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterNameError, TargetError
from luthier.layers.base import AdaptedModule


def test_plan_touches_nothing(tiny_llama: Callable, snapshot: Callable) -> None:
    model = tiny_llama()
    before = snapshot(model)
    state = [(path, type(m), sorted(vars(m))) for path, m in model.named_modules()]
    flags, generator = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    plan(model, LoraConfig(target_modules=["q_proj", "embed_tokens"], modules_to_save=["model.norm"], bias="all"))
    assert [(path, type(m), sorted(vars(m))) for path, m in model.named_modules()] == state
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


SETTINGS = [
    {"target_modules": "all-linear", "r": 5},
    {"target_modules": r".*\.(q|v)_proj", "r": 3},
    {"target_modules": ["embed_tokens", "lm_head"], "r": 2},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 1}},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    {"target_modules": "all-linear", "modules_to_save": ["q_proj"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True, "r": 3},
    {"target_modules": [], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_the_plan_counts_what_attaching_makes(tiny_llama: Callable, settings: dict, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    size = sum(p.numel() for p in model.parameters())
    planned = plan(model, LoraConfig(**settings))
    assert attach(model, LoraConfig(**settings)) == planned
    assert planned.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert planned.num_base_parameters == size
    assert planned.share == planned.num_parameters / size
    assert f"{planned.num_parameters:,} of {size:,} parameters" in str(planned)
    again = plan(model, LoraConfig(**settings))
    assert (again.layers, again.saved, again.num_base_parameters) == (planned.layers, planned.saved, size)


def test_all_linear_is_every_linear_layer_but_the_head(tiny_llama: Callable, tiny_gpt2: Callable) -> None:
    for make in (tiny_llama, tiny_gpt2):
        model = make()
        linear = {path for path, m in model.named_modules() if type(m).__name__ in {"Linear", "Conv1D"}}
        planned = plan(model, LoraConfig())
        assert {layer.path for layer in planned.layers} == linear - {"lm_head"}
        assert "lm_head" in linear


def test_all_linear_is_written_out_as_short_names(tiny_llama: Callable) -> None:
    assert sorted(plan(tiny_llama(), LoraConfig()).config.target_modules) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    excluded = plan(tiny_llama(), LoraConfig(exclude_modules=["layers.0.self_attn.q_proj"]))
    assert len(excluded.layers) == 13
    assert "q_proj" in excluded.config.target_modules


@pytest.mark.parametrize(("r", "count"), [(8, 2_442_240), (16, 4_884_480)])
def test_counts_at_the_size_of_smollm2(tiny_llama: Callable, r: int, count: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    planned = plan(model, LoraConfig(r=r))
    assert planned.num_parameters == count
    assert planned.num_base_parameters == 134_515_008  # the model card's 135M
    assert len(planned.layers) == 210


@given(st.sets(st.sampled_from(["q_proj", "k_proj", "gate_proj", "down_proj", "embed_tokens"]), min_size=1), st.integers(1, 9))
def test_any_choice_of_layers_counts_as_its_shapes_say(targets: set[str], r: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        sizes = {"hidden_size": 12, "intermediate_size": 31, "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 17}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, pad_token_id=0, **sizes))
    want = sum(r * sum(m.weight.shape) for path, m in model.named_modules() if path.rsplit(".", 1)[-1] in targets)
    assert plan(model, LoraConfig(r=r, target_modules=sorted(targets))).num_parameters == want


# --- faults -----------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A model of what cannot be adapted, and one layer that can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16)
        self.normed = parametrizations.orthogonal(nn.Linear(8, 8))
        self.table = nn.Embedding(5, 8, max_norm=1.0)
        self.small = nn.Linear(8, 8)
        self.small.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
        self.dispatched = nn.Linear(8, 8)
        self.dispatched.forward = lambda x: x
        self.conv = nn.ConvTranspose2d(3, 3, 1)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("attention.out_proj", "MultiheadAttention reads this weight itself"),
        ("encoder.linear1", "fast path"),
        ("encoder.linear2", "fast path"),
        ("normed", "parametrised"),
        ("table", "max_norm"),
        ("small", "torch.int8"),
        ("dispatched", "forward was replaced on the instance"),
        ("conv", "conv is a ConvTranspose2d; only Linear, Embedding"),
        ("goood", r"'goood' matches nothing\. Did you mean 'good'"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_is_touched(target: str, told: str) -> None:
    model = Parts()
    classes, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError, match=told):
        attach(model, LoraConfig(target_modules=["good", target]))
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags


def test_dora_is_refused_where_a_layer_has_a_forward_of_its_own() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"own": Doubled(3, 5), "plain": nn.Linear(3, 5)})
    attach(model, LoraConfig(target_modules=["own", "plain"]))
    detach(model)
    with pytest.raises(TargetError, match=r"own: it has a forward of its own, and use_dora"):
        attach(model, LoraConfig(target_modules=["own", "plain"], use_dora=True))


def test_all_faults_come_in_one_message() -> None:
    with pytest.raises(TargetError) as caught:
        plan(Parts(), LoraConfig(target_modules=["conv", "small", "goood"], modules_to_save=["tabel"]))
    assert "(4 faults)" in str(caught.value)
    for word in ("conv is a ConvTranspose2d", "torch.int8", "'goood' matches nothing", "Did you mean 'table'"):
        assert word in str(caught.value)


def test_all_linear_says_what_it_leaves_out() -> None:
    planned = plan(Parts(), LoraConfig())
    assert [layer.path for layer in planned.layers] == ["good"]
    assert any("leaves out" in warning and "attention.out_proj" in warning for warning in planned.warnings)


def test_all_linear_without_a_linear_layer_is_refused() -> None:
    with pytest.raises(TargetError, match="found no linear layer"):
        plan(nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}), LoraConfig())


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": ["q_prj"]}, r"'q_prj' matches nothing\. Did you mean 'q_proj'"),
        ({"target_modules": r".*q_prj"}, r"'\.\*q_prj' matches no module\. Layers here: .*q_proj"),
        ({"target_modules": ["self_attn"]}, "self_attn is a LlamaAttention; only Linear"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]}, "matches only what is excluded"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "outside layers_to_transform"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, "Did you mean 'lm_head'"),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["mlp", "up_proj"]},
            "up_proj lies in model.layers.0.mlp, which is saved whole",
        ),
        (
            {"target_modules": ["up_proj"], "modules_to_save": ["lp"]},
            "up_proj lies in model.layers.0.mlp, which modules_to_save replaces",
        ),
        ({"target_modules": ["q_proj"], "modules_to_save": ["act_fn"]}, "act_fn has no parameters to train"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(tiny_llama: Callable, settings: dict, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        plan(tiny_llama(), LoraConfig(**settings))


def test_replaced_modules_and_biases_must_be_reachable_too() -> None:
    with pytest.raises(TargetError, match="modules_to_save: dispatched: its forward was replaced"):
        plan(Parts(), LoraConfig(target_modules=["good"], modules_to_save=["dispatched"]))
    with pytest.raises(TargetError, match=r"bias='all' trains the bias of attention\.out_proj: nn\.MultiheadAttention"):
        plan(Parts(), LoraConfig(target_modules=["good"], bias="all"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rank_pattern": {"k_proj": 2}}, "rank_pattern key 'k_proj' matches no adapted layer"),
        ({"alpha_pattern": {"k_proj": 2}}, "alpha_pattern key 'k_proj' matches no adapted layer"),
        ({"exclude_modules": ["z_proj"]}, "exclude_modules entry 'z_proj' matches nothing"),
        ({"exclude_modules": "z_.*"}, r"exclude_modules entry 'z_\.\*' matches nothing"),
        ({"layers_to_transform": [0, 9]}, "layers_to_transform index 9 matches no adapted layer"),
        ({"bias": "lora_only"}, "no adapted layer has a bias"),
        ({"target_modules": ["embed_tokens"], "lora_dropout": 0.1}, "lora_dropout has no effect on embedding"),
        (
            {"target_modules": ["embed_tokens"]},
            "model.embed_tokens and lm_head share one weight.* leaves lm_head as the base has it",
        ),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "each by its own update"),
    ],
)
def test_settings_without_effect_are_told(
    tiny_llama: Callable, settings: dict, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_llama(tie_word_embeddings="lora_dropout" not in settings)  # tied tables have a warning of their own
    planned = plan(model, LoraConfig(**{"target_modules": ["q_proj"], **settings}))
    assert len(planned.warnings) == 1
    assert re.search(told, planned.warnings[0])
    assert f"note: {planned.warnings[0]}" in str(planned)
    attach(model, planned.config)
    assert planned.warnings[0] in caplog.text


def test_a_plain_plan_warns_of_nothing(tiny_llama: Callable) -> None:
    assert plan(tiny_llama(), LoraConfig(lora_dropout=0.1, exclude_modules=["k_proj"])).warnings == ()


@pytest.mark.parametrize(
    "name", ["layers", "q_proj", "weight", "model", "../x", "keys", "training", "type", "", "größe", "lora_A", "0"]
)
def test_names_that_would_lose_tensors_are_refused_before_anything_is_touched(tiny_llama: Callable, name: str) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterNameError):
        attach(model, LoraConfig(target_modules=["q_proj"]), name)
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["default", "sql-v3", "A", "x_1", "-"])
def test_plain_names_work_through_a_whole_life(tiny_llama: Callable, name: str) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["model.norm"]), name)
    assert len(list(adapter_parameters(model, name))) == 2 * 2 + 1
    detach(model, name)


# --- shared modules ---------------------------------------------------------------------------------------


def test_a_model_with_shared_modules(fill: Callable, dense_twin: Callable) -> None:
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=67, embedding_size=16, hidden_size=24, num_attention_heads=4, intermediate_size=37, num_hidden_layers=3
    )
    model = AlbertModel(config).eval()  # one block, run three times
    base, ids = copy.deepcopy(model), torch.arange(4, 16).reshape(2, 6)
    planned = attach(model, LoraConfig(r=4, lora_alpha=4, target_modules=["query", "word_embeddings"]))
    assert len(planned.layers) == 2
    assert torch.equal(model(ids)[0], base(ids)[0])
    fill(model)
    want = dense_twin(base, model, 1.0)(ids)[0]
    torch.testing.assert_close(model(ids)[0].double(), want, rtol=1e-3, atol=1e-3)
    merge(model)
    torch.testing.assert_close(model(ids)[0].double(), want, rtol=1e-3, atol=1e-3)
    unmerge(model)
    detach(model)
    assert torch.equal(model(ids)[0], base(ids)[0])


def test_a_module_under_two_names_gets_one_adapter(fill: Callable) -> None:
    shared = nn.Linear(5, 5)
    model = nn.ModuleDict({"first": shared, "second": shared})
    planned = attach(model, LoraConfig(r=2, target_modules=["first"]))
    fill(model)
    assert planned.num_parameters == 20
    x = torch.randn(3, 5)
    assert model["first"] is model["second"]
    assert not torch.equal(model["second"](x), x @ shared.weight.T + shared.bias)
    detach(model)
    assert type(model["second"]) is nn.Linear
