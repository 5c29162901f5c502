"""Fused modules beside the modules they stand for: same numbers, same gradients, and the module's own forward where needed."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from luthier.adapt import attach
from luthier.core.config import LoraConfig
from luthier.layers import fused as fused_room
from luthier.layers.fused import FusedAttention, FusedGatedMLP, FusedModule, FusedNorm, fuse_module, projection_of, unfuse_module
from luthier.ops.documents import Documents

SIZES = {"hidden_size": 24, "intermediate_size": 37, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
LENGTHS = (9, 4, 4, 1)


def config_of(kind: type = LlamaConfig, **settings: object) -> LlamaConfig:
    config = kind(**SIZES, **settings)
    config._attn_implementation = "sdpa"
    return config


def frozen(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the module with random numbers everywhere and without gradients."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype).requires_grad_(False)


def adapted(module: nn.Module, names: Sequence[str], **settings: object) -> nn.Module:
    attach(module, LoraConfig(r=3, lora_alpha=6, target_modules=list(names), init_lora_weights=False, **settings))
    return module.to(next(module.parameters()).dtype)


def pairs_of(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def is_fast(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[], object]) -> bool:
    """Whether `run` calls this function of `luthier.ops`."""
    calls, real = [], getattr(fused_room, name)
    with monkeypatch.context() as patch:
        patch.setattr(fused_room, name, lambda *given, **named: calls.append(1) or real(*given, **named))
        run()
    return bool(calls)


def assert_same(run: Callable[[], Tensor], module: nn.Module, kind: type[FusedModule], inputs: list[Tensor]) -> None:
    """Compare output and gradients of a module before and while it is fused, in float64."""
    leaves = [*inputs, *pairs_of(module)]
    own, results = type(module), []
    for is_fused in (False, True):
        if is_fused:
            fuse_module(module, kind)
        torch.manual_seed(2)
        output = run()
        torch.manual_seed(3)
        results.append([output, *torch.autograd.grad(output, leaves, torch.randn_like(output))])
    unfuse_module(module)
    assert type(module) is own
    for found, want in zip(*results, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)


# --- changing and giving back the class ---------------------------------------------------------------------------


def test_a_fused_module_is_what_it_was_and_more() -> None:
    module = frozen(LlamaMLP(config_of()))
    state, children = module.state_dict(), dict(module.named_children())
    fuse_module(module, FusedGatedMLP)
    assert isinstance(module, LlamaMLP) and isinstance(module, FusedGatedMLP) and "LlamaMLP" in type(module).__name__
    assert module.unfused_class is LlamaMLP
    assert dict(module.named_children()) == children and list(module.state_dict()) == list(state)
    second = frozen(LlamaMLP(config_of()))
    fuse_module(second, FusedGatedMLP)
    assert type(second) is type(module)
    unfuse_module(module)
    assert type(module) is LlamaMLP and type(second) is not LlamaMLP


# --- norm ---------------------------------------------------------------------------------------------------------


def test_norm() -> None:
    # transformers computes norms in float32, whatever the input is: in float32 the two are the same to rounding.
    norm = frozen(LlamaRMSNorm(24, eps=1e-3), torch.float32)
    x = torch.randn(2, 5, 24, requires_grad=True)
    upstream, want = torch.randn(2, 5, 24), norm(x)
    fuse_module(norm, FusedNorm)
    found = norm(x)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (found, want)), rtol=1e-5, atol=1e-6)


def test_a_norm_that_calls_its_epsilon_otherwise() -> None:
    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(24), requires_grad=False), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()

    norm, x = OtherRMSNorm().double(), torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert_same(lambda: norm(x), norm, FusedNorm, [x])


def with_magnitudes(module: nn.Module) -> nn.Module:
    """Return the module with DoRA's magnitudes moved away from the norms."""
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if path.endswith(".magnitude"):
                parameter.mul_(0.5 + torch.rand_like(parameter))
    return module


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], ["down_proj"], ["up_proj"]])
@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_with_dora(names: list[str], bias: bool, dropout: float) -> None:
    mlp = with_magnitudes(adapted(frozen(LlamaMLP(config_of(mlp_bias=bias))), names, use_dora=True, lora_dropout=dropout))
    x = torch.randn(3, 7, 24, dtype=torch.float64, requires_grad=True)
    assert_same(lambda: mlp.train()(x), mlp, FusedGatedMLP, [x])


@pytest.mark.parametrize("names", [["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj"], ["q_proj", "v_proj"]])
def test_projections_of_attention_with_dora(names: list[str]) -> None:
    attention = with_magnitudes(adapted(frozen(LlamaAttention(config_of(attention_bias=True), 0)), names, use_dora=True))
    x = torch.randn(1, 7, 24, dtype=torch.float64)
    fuse_module(attention, FusedAttention)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = attention.get_submodule(name)
        seen = torch.randn(1, 7, layer.weight.shape[1], dtype=torch.float64)
        weight = layer.weight
        if name in names:
            pair = layer.lora["default"]
            inner = weight + 2.0 * pair.lora_B @ pair.lora_A
            weight = pair.magnitude[:, None] * inner / inner.norm(dim=1, keepdim=True)
        torch.testing.assert_close(attention._project(seen, name)[0], seen @ weight.T + layer.bias, rtol=1e-11, atol=1e-11)
    together = attention._project(x, "q_proj", "k_proj", "v_proj")
    alone = [attention.get_submodule(name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_a_norm_that_is_trained_or_under_autocast_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = frozen(LlamaRMSNorm(24), torch.float32), torch.randn(2, 24)
    fuse_module(norm, FusedNorm)
    assert is_fast(monkeypatch, "rms_norm", lambda: norm(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_fast(monkeypatch, "rms_norm", lambda: norm(x))
    norm.weight.requires_grad_()
    assert not is_fast(monkeypatch, "rms_norm", lambda: norm(x))
    norm(x).sum().backward()
    assert norm.weight.grad.abs().sum() > 0


# --- gated MLP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("gate_proj",), ("down_proj",), ("gate_proj", "up_proj", "down_proj")], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1, 3), (2, 30), (1, 0)], ids=str)
def test_gated_mlp(monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], bias: bool, leading: tuple[int, ...]) -> None:
    module = frozen(LlamaMLP(config_of(mlp_bias=bias)))
    if names:
        adapted(module, names)
    x = torch.randn(*leading, 24, dtype=torch.float64, requires_grad=True)
    assert_same(lambda: module(x), module, FusedGatedMLP, [x])
    fuse_module(module, FusedGatedMLP)
    assert is_fast(monkeypatch, "gated_projection", lambda: module(x))


def test_dropout_in_a_gated_mlp_is_drawn_as_before() -> None:
    module = adapted(frozen(LlamaMLP(config_of())), ["gate_proj", "up_proj", "down_proj"], lora_dropout=0.4).train()
    x = torch.randn(2, 9, 24, dtype=torch.float64, requires_grad=True)
    assert_same(lambda: module(x), module, FusedGatedMLP, [x])


@pytest.mark.parametrize("change", ["weight trained", "bias trained", "pair with bias", "other dtype", "autocast, all adapted"])
def test_a_gated_mlp_that_is_not_frozen_runs_its_own_forward(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    module = frozen(LlamaMLP(config_of(mlp_bias=True)), torch.float32)
    x = torch.randn(2, 24)
    names = ["gate_proj", "up_proj", "down_proj"]
    if change == "pair with bias":
        adapted(module, names, bias="lora_only")
    elif change == "autocast, all adapted":
        adapted(module, names)
    elif change == "other dtype":
        module.up_proj.bfloat16()
    fuse_module(module, FusedGatedMLP)
    if change == "weight trained":
        module.down_proj.weight.requires_grad_()
    elif change == "bias trained":
        module.down_proj.bias.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast, all adapted"):
        if change == "other dtype":  # its own forward says what is wrong
            with pytest.raises(RuntimeError, match="dtype"):
                module(x)
            return
        assert not is_fast(monkeypatch, "gated_projection", lambda: module(x))
    module(x).sum().backward()
    trained = pairs_of(module)
    assert trained and all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize("names", [(), ("gate_proj", "up_proj", "down_proj")], ids=str)
def test_a_gated_mlp_under_autocast_is_what_it_was(names: tuple[str, ...]) -> None:
    module = frozen(LlamaMLP(config_of()), torch.float32)
    if names:
        adapted(module, names)
    x = torch.randn(2, 5, 24, requires_grad=True)
    results = []
    for is_fused in (False, True):
        if is_fused:
            fuse_module(module, FusedGatedMLP)
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        results.append([output, *torch.autograd.grad(output.float().sum(), [x, *pairs_of(module)])])
    for found, want in zip(*results, strict=True):
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, rtol=0.05, atol=0.5)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_of(kind: str) -> nn.Module:
    if kind == "qwen3":
        return frozen(Qwen3Attention(config_of(Qwen3Config), 0))
    return frozen(LlamaAttention(config_of(attention_bias=kind == "llama with bias"), 0))


def angles_of(position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return LlamaRotaryEmbedding(config_of())(torch.empty(0, dtype=torch.float64), position_ids)


def apart(module: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each document alone through the module's own forward, under a mask written out."""
    outputs = []
    for part in x.split(lengths, dim=1):
        length = part.shape[1]
        mask = torch.full((1, 1, length, length), float("-inf"), dtype=x.dtype).triu(1)
        outputs.append(module(part, angles_of(torch.arange(length)[None]), mask)[0])
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("kind", ["llama", "llama with bias", "qwen3"])
@pytest.mark.parametrize("names", [(), ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")], ids=str)
def test_packed_attention_is_each_document_alone(kind: str, names: tuple[str, ...]) -> None:
    module = attention_of(kind)
    if names:
        adapted(module, names)
    x = torch.randn(1, sum(LENGTHS), 24, dtype=torch.float64, requires_grad=True)
    want = apart(module, x, LENGTHS)
    fuse_module(module, FusedAttention)
    documents = Documents(LENGTHS)
    found, weights = module(x, angles_of(documents.position_ids), None, documents=documents)
    assert weights is None
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)
    leaves, upstream = [x, *pairs_of(module)], torch.randn_like(want)
    for each, wanted in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (found, want)), strict=True):
        torch.testing.assert_close(each, wanted, rtol=1e-9, atol=1e-10)


def test_attention_without_documents_is_the_modules_own_to_the_bit() -> None:
    module = attention_of("llama")
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    angles = angles_of(torch.arange(7)[None])
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    wanted = [module(x, angles, None)[0], module(x, angles, mask)[0]]
    fuse_module(module, FusedAttention)
    assert torch.equal(module(x, angles, None)[0], wanted[0])
    assert torch.equal(module(x, position_embeddings=angles, attention_mask=mask)[0], wanted[1])


def test_attention_with_several_live_adapters_calls_its_layers() -> None:
    module = adapted(attention_of("llama"), ["q_proj", "v_proj"])
    attach(module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "second")
    module.double()
    module.q_proj.roster.active = {"default": 1.0, "second": 1.0}
    x = torch.randn(1, sum(LENGTHS), 24, dtype=torch.float64)
    want = apart(module, x, LENGTHS)
    fuse_module(module, FusedAttention)
    documents = Documents(LENGTHS)
    found = module(x, angles_of(documents.position_ids), documents=documents)[0]
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-11)


def test_documents_and_a_cache_do_not_go_together() -> None:
    module = attention_of("llama")
    fuse_module(module, FusedAttention)
    documents = Documents((3,))
    with pytest.raises(AssertionError):
        module(torch.randn(1, 3, 24).double(), angles_of(documents.position_ids), documents=documents, past_key_values=object())


# --- which layers are projections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_linear_layer_is_a_projection(bias: bool) -> None:
    layer, x = nn.Linear(5, 3, bias=bias).requires_grad_(False), torch.randn(2, 5)
    projection = projection_of(layer, x)
    assert projection.weight is layer.weight and projection.bias is layer.bias
    assert projection.lora_A is None and projection.lora_B is None and projection.dropout == 0.0


def test_a_linear_layer_that_must_be_called_is_none() -> None:
    class OtherLinear(nn.Linear):
        pass

    x = torch.randn(2, 5)
    assert projection_of(nn.Linear(5, 3), x) is None
    assert projection_of(nn.Linear(5, 3).requires_grad_(False), x.double()) is None
    assert projection_of(OtherLinear(5, 3).requires_grad_(False), x) is None
    assert projection_of(nn.Identity(), x) is None


def test_a_linear_layer_whose_bias_is_trained_is_none() -> None:
    layer = nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    assert projection_of(layer, torch.randn(2, 5)) is None


def test_a_linear_layer_under_autocast_is_none() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert projection_of(nn.Linear(5, 3).requires_grad_(False), torch.randn(2, 5)) is None
