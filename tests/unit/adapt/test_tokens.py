"""Trained rows of a table: the model computes what it would with these rows written in, tied head included."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from luthier.adapt import activate, adapter_parameters, attach, detach, disabled, merge, plan, unmerge
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, TargetError
from luthier.layers.base import AdaptedModule

TOKENS = [200, 3, 42]
each_tie = pytest.mark.parametrize("tied", [True, False])


def adapted(model: nn.Module, tokens: list[int] | dict[str, list[int]] = TOKENS, **settings: object) -> LoraConfig:
    config = LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": tokens} | settings))
    attach(model, config)
    return config


def rows_of(model: nn.Module) -> nn.Parameter:
    return next(item.parameter for item in adapter_parameters(model) if item.role == "rows")


def fill(model: nn.Module) -> None:
    with torch.no_grad():
        rows_of(model).add_(torch.randn_like(rows_of(model)))


def dense(base: nn.Module, rows: Tensor, tokens: list[int] = TOKENS, name: str = "model.embed_tokens") -> nn.Module:
    """Return a float64 copy of the base with the rows written into its table, a leaf that records gradients."""
    twin = copy.deepcopy(base).double().requires_grad_(False)
    weight = twin.get_submodule(name).weight
    weight.data[tokens] = rows.detach().double()
    weight.requires_grad_()
    return twin


@pytest.fixture
def batch() -> Tensor:
    """Return ids with trained and untrained tokens."""
    return torch.tensor([[200, 17, 3, 3, 5], [8, 42, 9, 200, 210]])


@each_tie
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapter_changes_nothing(tiny_llama: Callable, batch: Tensor, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_llama(tie_word_embeddings=tied, dtype=dtype)
    before = model(batch).logits
    adapted(model)
    assert torch.equal(model(batch).logits, before)


@each_tie
def test_logits_and_gradients_are_those_of_the_written_table(tiny_llama: Callable, batch: Tensor, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    base = copy.deepcopy(model)
    adapted(model)
    fill(model)
    twin = dense(base, rows_of(model))
    got, want = model(batch).logits, twin(batch).logits
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert (got - base(batch).logits).abs().max() > 0.1
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream.double())
    exact = twin.model.embed_tokens.weight.grad[TOKENS]
    assert float((rows_of(model).grad.double() - exact).abs().max() / exact.abs().max()) < 1e-5
    assert model.model.embed_tokens.weight.grad is None


@each_tie
def test_merged_table_holds_the_rows_and_unmerge_is_bit_exact(tiny_llama: Callable, batch: Tensor, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied, dtype=torch.bfloat16)
    adapted(model)
    fill(model)
    table, before, logits = model.model.embed_tokens, model.model.embed_tokens.weight, model(batch).logits
    want = before.detach().clone()
    want[TOKENS] = rows_of(model).detach().bfloat16()
    merge(model)
    assert torch.equal(table.weight, want) and torch.equal(model.lm_head.weight, want) is tied
    torch.testing.assert_close(model(batch).logits, logits, rtol=0.1, atol=0.1)
    unmerge(model)
    assert table.weight is before and (model.lm_head.weight is before) is tied
    assert torch.equal(model(batch).logits, logits)


@each_tie
def test_disabled_and_detached_are_the_base(tiny_llama: Callable, batch: Tensor, tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    before, classes = model(batch).logits, [type(module) for module in model.modules()]
    adapted(model)
    fill(model)
    with disabled(model):
        assert torch.equal(model(batch).logits, before)
    detach(model)
    assert torch.equal(model(batch).logits, before)
    assert [type(module) for module in model.modules()] == classes


def test_only_the_rows_are_kept_and_counted(tiny_llama: Callable) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    planned = plan(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    adapted(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert planned.num_parameters == sum(parameter.numel() for parameter in trained) == 3 * 48 + 2 * (2 * (48 + 48))
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers + planned.num_parameters
    assert "3 rows of model.embed_tokens (144)" in str(planned)
    assert [item.path for item in adapter_parameters(model) if item.role == "rows"] == ["model.embed_tokens"]


def test_a_padding_row_is_used_and_gets_no_gradient(tiny_llama: Callable) -> None:
    model = tiny_llama()
    table = model.model.embed_tokens
    assert table.padding_idx == 2
    adapted(model, [9, 2])
    fill(model)
    out = table(torch.tensor([2, 9, 7]))
    assert torch.equal(out[:2], rows_of(model)[[1, 0]])
    out.sum().backward()
    assert rows_of(model).grad.abs().sum(1).tolist() == [48, 0]


def test_a_scaled_table_scales_its_rows(tiny_llama: Callable) -> None:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    model = nn.ModuleDict({"embed": Gemma3TextScaledWordEmbedding(29, 11, 0, embed_scale=1152**0.5).eval()})
    attach(model, LoraConfig(target_modules=[], trainable_token_indices={"embed": [4, 7]}))
    fill(model)
    torch.testing.assert_close(model["embed"](torch.tensor([7, 4])), rows_of(model)[[1, 0]] * 1152**0.5)


def test_a_head_with_a_bias_keeps_it() -> None:
    model = nn.ModuleDict({"head": nn.Linear(11, 29)})
    weight, bias, x = (tensor.detach().double() for tensor in (model["head"].weight, model["head"].bias, torch.randn(2, 3, 11)))
    attach(model, LoraConfig(target_modules=[], trainable_token_indices={"head": [4, 7]}))
    fill(model)
    weight = weight.index_copy(0, torch.tensor([4, 7]), rows_of(model).detach().double())
    torch.testing.assert_close(model["head"](x.float()).double(), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("travel", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_rows_between_table_and_head_as_the_original_does(
    tiny_llama: Callable, batch: Tensor, travel: Callable
) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    adapted(model)
    fill(model)
    other = travel(model)
    assert torch.equal(other(batch).logits, model(batch).logits)
    assert rows_of(other) is not rows_of(model)
    before = other(batch).logits
    fill(other)
    assert isinstance(other.lm_head, AdaptedModule) and other.lm_head.replacements["default"].rows is rows_of(other)
    assert not torch.equal(other(batch).logits, before)


def test_two_adapters_with_rows_are_used_one_at_a_time(tiny_llama: Callable, batch: Tensor) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    base = copy.deepcopy(model)
    adapted(model)
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5]), "b")
    with pytest.raises(AdapterStateError, match="only one of them can be active"):
        activate(model, ["default", "b"])
    activate(model, "b")
    rows = next(item.parameter for item in adapter_parameters(model, "b") if item.role == "rows")
    with torch.no_grad():
        rows.add_(1.0)
    torch.testing.assert_close(model(batch).logits.double(), dense(base, rows, [5])(batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "settings", "told"),
    [
        ([3, 211], {}, r"has 211 rows; there is no row for tokens \[211\]"),
        ([-1], {}, "no row for tokens"),
        ([3, 3], {}, "names one twice"),
        ({"embed_tokens": []}, {}, "empty"),
        ({"embed": [3]}, {}, "embed matches nothing"),
        ({"norm": [3]}, {}, "only Embedding and Linear"),
        ([3], {"target_modules": ["embed_tokens"]}, "choose one"),
        ([3], {"target_modules": ["lm_head"]}, "lm_head is adapted or trained otherwise"),
        ([3], {"modules_to_save": ["embed_tokens"]}, "choose one"),
        ({"embed_tokens": [3], "lm_head": [4]}, {}, "choose one"),
    ],
)
def test_what_does_not_fit_is_refused(tiny_llama: Callable, tokens: object, settings: dict[str, object], told: str) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(TargetError, match=told):
        adapted(model, tokens, **settings)  # type: ignore[arg-type]
    assert not any(isinstance(module, AdaptedModule) for module in model.modules())


def test_a_tied_head_that_is_named_too_is_trained_once(tiny_llama: Callable) -> None:
    planned = plan(
        tiny_llama(tie_word_embeddings=True),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS}),
    )
    assert [(table.path, table.tied) for table in planned.tables] == [("model.embed_tokens", ("lm_head",))]
