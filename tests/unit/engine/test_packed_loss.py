"""The loss of rows laid end to end, and of fused models at all, against each row alone in transformers' own forward.

The oracle is the unfused model: one row, its full logits, cross entropy written out. Nothing of it is shared with what is tested
but the weights.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import fuse, fusion_of, unfuse
from luthier.adapt.state import adapter_parameters
from luthier.adapt.switching import disabled
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterStateError, DataError
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.engine.score import answer_loss, answer_loss_plain, can_take_packed, held_out_loss
from luthier.ops.compiler import has_compiler, use_compiler
from luthier.ops.elementwise import rms_norm, rms_norm_plain

VOCABULARY = 211
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
FAMILIES = sorted(CONFIGS)
WINDOWS = {
    "mistral": {"sliding_window": 12},
    "qwen2": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
}
# float32: what adding the same numbers in another order leaves. float64: nothing but that, so a wrong formula cannot hide.
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
ALL = {"target_modules": "all-linear"}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(family: str, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    """Return a random model of odd sizes whose norms and biases are not at the values that hide a mistake."""
    config = CONFIGS[family](
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "intermediate_size": 75,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
            **({"sliding_window": None} if family == "mistral" else {}),
            **settings,
        }
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, lora: dict | None = None, **settings: object) -> nn.Module:
    """Return a model with an adapter of which no number is zero, not fused."""
    model = build(family, torch.float32, **settings)
    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | (lora or ALL)
    attach(model, LoraConfig(**config))
    with torch.no_grad():
        for item in adapter_parameters(model):
            item.parameter.add_(torch.randn_like(item.parameter) * 0.1)
    return model.to(dtype).eval()


def row(index: int, length: int, labelled: range | list[int]) -> EncodedRow:
    """Return a row of random tokens of which those at the places `labelled` are labelled."""
    ids = torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(index)).tolist()
    return EncodedRow(index, ids, [token if place in labelled else UNLABELLED for place, token in enumerate(ids)])


def mixed_rows() -> list[EncodedRow]:
    """Return rows unlike in every respect that packing could mind; one is long enough for attention to work in blocks."""
    return [
        row(0, 13, range(5, 9)),  # the middle only
        row(1, 7, [6]),  # the last token only
        row(2, 10, [0, 1, 7]),  # the first token too, which never counts
        row(3, 150, range(40, 150)),
        row(4, 6, [0]),  # the first token only: nothing to predict
        row(5, 7, range(7)),
        row(6, 1, [0]),
        row(7, 2, [1]),
        row(8, 12, [2, 3, 8, 9, 10]),  # two answers
    ]


def short_rows() -> list[EncodedRow]:
    """Return rows of which none is longer than 12 tokens."""
    return [row(index, length, range(length // 2, length)) for index, length in enumerate((12, 5, 9, 12, 3))]


def oracle_loss(model: nn.Module, one: EncodedRow) -> Tensor:
    """Return the summed loss of one row alone, from all logits of the model's own forward, in its own precision."""
    logits_TV = model(input_ids=torch.tensor([one.input_ids]), use_cache=False).logits[0, :-1]
    return F.cross_entropy(logits_TV, torch.tensor(one.labels[1:]), ignore_index=UNLABELLED, reduction="sum")


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every adapter tensor by name, and leave none behind."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    found = {f"{item.path}.{item.role}": item.parameter.grad for item in adapter_parameters(model)}
    model.zero_grad(set_to_none=True)
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient: {missing}"
    return found


def lone(model: nn.Module, rows: list[EncodedRow]) -> tuple[float, dict[str, Tensor]]:
    """Return the sum over rows of their losses and gradients, each row alone in the unfused model."""
    assert not fusion_of(model).norms, "the oracle is the unfused model"
    total, gradients = 0.0, {f"{item.path}.{item.role}": torch.zeros_like(item.parameter) for item in adapter_parameters(model)}
    for one in rows:
        if not any(label != UNLABELLED for label in one.labels[1:]):
            continue
        loss = oracle_loss(model, one)
        total += loss.item()
        for name, gradient in gradients_of(loss, model).items():
            gradients[name] += gradient
    return total, gradients


def assert_same(loss: Tensor, model: nn.Module, wanted: tuple[float, dict[str, Tensor]], dtype: torch.dtype) -> None:
    """Compare a loss and its gradients with the oracle's, tensor by tensor in norm."""
    assert loss.item() == pytest.approx(wanted[0], rel=LOSS_TOLERANCE[dtype])
    found = gradients_of(loss, model)
    assert found.keys() == wanted[1].keys()
    errors = {name: float((found[name] - each).norm() / each.norm()) for name, each in wanted[1].items()}
    assert {name: error for name, error in errors.items() if not error <= GRADIENT_TOLERANCE[dtype]} == {}


def fused(model: nn.Module) -> nn.Module:
    """Fuse, and be sure that everything was: a test of what was left alone would prove nothing."""
    fusion = fuse(model)
    layers = model.config.num_hidden_layers
    assert (fusion.attentions, fusion.mlps, fusion.packs, fusion.head_is_plain) == (layers, layers, True, True)
    return model


def only_labelled(batch: PackedBatch, place: int) -> PackedBatch:
    """Return the same batch with labels in one of its documents only."""
    start = sum(batch.lengths[:place])
    targets = torch.full_like(batch.targets, UNLABELLED)
    inside = slice(start, start + batch.lengths[place])
    targets[inside] = batch.targets[inside]
    return PackedBatch(batch.input_ids, targets, batch.lengths)


def labelled_count(rows: list[EncodedRow]) -> int:
    return sum(label != UNLABELLED for one in rows for label in one.labels[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_loss_and_gradients_of_each_row_alone(family: str, dtype: torch.dtype) -> None:
    model, rows = adapted(family, dtype), mixed_rows()
    wanted = lone(model, rows)
    loss, count = answer_loss(fused(model), pack(rows))
    assert count == labelled_count(rows)
    assert_same(loss, model, wanted, dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_documents_share_of_a_packed_batch_is_what_it_has_alone(family: str) -> None:
    model, rows = adapted(family, torch.float64), mixed_rows()
    in_order = sorted(rows, key=len, reverse=True)
    places = [0, 2, 3, 5]
    wanted = [lone(model, [in_order[place]]) for place in places]
    batch = pack(rows)
    fused(model)
    for place, each in zip(places, wanted, strict=True):
        loss, count = answer_loss(model, only_labelled(batch, place))
        assert count == labelled_count([in_order[place]])
        assert_same(loss, model, each, torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_in_a_packed_batch(family: str) -> None:
    model, rows = adapted(family), mixed_rows()
    wanted = lone(model, rows)
    fused(model).train()
    enable_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert_same(answer_loss(model, pack(rows))[0], model, wanted, torch.float32)


def enable_checkpointing(model: nn.Module) -> None:
    """As the training loop does it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.fixture
def _compiled() -> Iterator[None]:
    if not has_compiler():
        pytest.skip("there is no C++ compiler here")
    torch.compiler.reset()  # how often a kernel was compiled before is not this test's affair
    assert use_compiler(True)
    yield
    use_compiler(False)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_compiled_kernels_change_nothing(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    for family in ("llama", "qwen3"):
        model, rows = adapted(family, dtype), mixed_rows()
        wanted = lone(model, rows)
        fused(model)
        assert_same(answer_loss(model, pack(rows))[0], model, wanted, dtype)
        assert_same(answer_loss(model, collate(rows, 0))[0], model, wanted, dtype)
    assert "the compiler failed" not in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled")
def test_a_compiled_kernel_takes_whatever_shapes_a_process_meets() -> None:
    """Packed and padded rows, hidden states and heads, with gradients and without, a second model: no limit may be hit."""
    for width in (48, 12):
        for shape in ((1, 7, width), (3, 5, width), (20, 4, width), (33, width)):
            for requires_grad in (True, False):
                x, weight = torch.randn(shape, requires_grad=requires_grad), torch.rand(width)
                for dtype in (torch.float32, torch.float64):
                    found = rms_norm(x.to(dtype), weight.to(dtype), 1e-6)
                    wanted = rms_norm_plain(x.to(dtype), weight.to(dtype), 1e-6)
                    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_document_sees_another(family: str) -> None:
    model, rows = fused(adapted(family)), mixed_rows()
    seen: list[Tensor] = []
    model.get_decoder().register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state[0].detach()))
    batch = pack(rows)
    answer_loss(model, batch)
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    for length, end in zip(batch.lengths, ends, strict=True):
        inside = slice(end - length, end)
        ids = batch.input_ids.clone()
        ids[0, inside] = (ids[0, inside] + 1) % VOCABULARY
        answer_loss(model, PackedBatch(ids, batch.targets, batch.lengths))
        own = torch.zeros(batch.num_tokens, dtype=torch.bool)
        own[inside] = True
        assert not torch.equal(seen[-1][own], seen[0][own]), "the change was not seen at all"
        assert torch.equal(seen[-1][~own], seen[0][~own])


def test_the_order_in_which_rows_are_packed_does_not_matter() -> None:
    model, rows = fused(adapted(dtype=torch.float64)), mixed_rows()
    losses = [answer_loss(model, pack(order))[0].item() for order in (rows, rows[::-1], rows[4:] + rows[:4])]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_of_a_fused_model_have_the_plain_loss(family: str, dtype: torch.dtype) -> None:
    model, rows = adapted(family, dtype), mixed_rows()
    batch = collate(rows, 0)
    plain, plain_count = answer_loss_plain(model, batch)
    wanted = lone(model, rows)
    loss, count = answer_loss(fused(model), batch)
    assert count == plain_count == labelled_count(rows)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)  # the plain one is summed in float32
    assert_same(loss, model, wanted, dtype)


@pytest.mark.parametrize("make_batch", [pack, lambda rows: collate(rows, 0)], ids=["packed", "padded"])
@pytest.mark.parametrize("targets", [["lm_head"], [*LINEARS, "lm_head"]], ids=["head-only", "with-head"])
@pytest.mark.parametrize(
    "method", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora", "rsdora"]
)
def test_an_adapted_head_learns_as_in_the_unfused_model(method: dict[str, bool], targets: list[str], make_batch: object) -> None:
    for dtype in (torch.float32, torch.float64):
        lora = {"target_modules": targets} | method
        model, rows = adapted(dtype=dtype, lora=lora, tie_word_embeddings=False), mixed_rows()
        wanted = lone(model, rows)
        assert any(name.startswith("lm_head.") for name in wanted[1])
        assert_same(answer_loss(fused(model), make_batch(rows))[0], model, wanted, dtype)  # type: ignore[operator]


@pytest.mark.parametrize("make_batch", [pack, lambda rows: collate(rows, 0)], ids=["packed", "padded"])
def test_dropout_before_an_adapted_head_works_in_training_and_is_off_outside(make_batch: object) -> None:
    lora = {"target_modules": [*LINEARS, "lm_head"], "lora_dropout": 0.4}
    model, rows = adapted(lora=lora, tie_word_embeddings=False), mixed_rows()
    wanted = lone(model, rows)
    batch: Batch | PackedBatch = make_batch(rows)  # type: ignore[operator]
    fused(model).train()
    first, second = (answer_loss(model, batch)[0] for _ in range(2))
    assert first.item() != second.item(), "nothing was dropped"
    assert all(bool(gradient.isfinite().all() and gradient.any()) for gradient in gradients_of(first, model).values())
    assert_same(answer_loss(model.eval(), batch)[0], model, wanted, torch.float32)


def test_dropout_of_the_head_alone_is_as_strong_as_in_the_unfused_model() -> None:
    model = adapted(lora={"target_modules": ["lm_head"], "lora_dropout": 0.4}, tie_word_embeddings=False).train()
    rows = [row(0, 9, range(9)), row(1, 9, range(9))]
    kept = []
    for each in (model, fused(model)):
        losses = []
        for seed in range(60):
            torch.manual_seed(seed)
            losses.append(answer_loss(each, collate(rows, 0))[0].item())
        kept.append(torch.tensor(losses))
    # Other positions may be drawn for, so other masks; what they are on average must be the same.
    assert abs(kept[0].mean() - kept[1].mean()) < 4 * kept[0].std() / 60**0.5
    assert kept[0].std() > 0


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.self_attn"]},
        {"target_modules": ["down_proj"], "modules_to_save": ["self_attn"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["layers.1"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "layers.0.input_layernorm"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["up_proj", "k_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": LINEARS, "bias": "lora_only"},
        {"target_modules": ["v_proj"], "bias": "all"},
        {"target_modules": ["o_proj", "up_proj"], "lora_bias": True},
        {"target_modules": ["k_proj"], "trainable_token_indices": list(range(3, 40))},
    ],
    ids=lambda lora: "-".join([*lora.get("modules_to_save", lora["target_modules"]), lora.get("bias", "")]).rstrip("-"),
)
def test_whatever_an_adapter_replaces_is_live_in_a_fused_model(lora: dict) -> None:
    model, rows = adapted("qwen2", torch.float64, lora=lora), mixed_rows()
    wanted, gradients, silent = unfused(model, rows)
    assert abs(wanted.item() - silent.item()) > 1e-3, "the adapter does nothing, so nothing is compared"
    fuse(model)
    batches: list[Batch | PackedBatch] = [collate(rows, 0)]
    if can_take_packed(model, rows):
        batches.append(pack(rows))
    for batch in batches:
        model.zero_grad(set_to_none=True)
        loss, _ = answer_loss(model, batch)
        # A head that is not plain goes through answer_loss's plain path, which sums in float32.
        tolerance = 1e-10 if fusion_of(model).head_is_plain else 1e-6
        assert loss.item() == pytest.approx(wanted.item(), rel=tolerance)
        loss.backward()
        for item in adapter_parameters(model):
            name = f"{item.path}.{item.role}.{item.key}"
            assert item.parameter.grad is not None, f"{name} has no gradient"
            each = gradients[name]
            assert float((item.parameter.grad - each).norm() / each.norm().clamp_min(1e-30)) <= max(tolerance, 1e-9), name
        with disabled(model), torch.no_grad():
            assert answer_loss(model, batch)[0].item() == pytest.approx(silent.item(), rel=tolerance)


def unfused(model: nn.Module, rows: list[EncodedRow]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return the unfused model's loss with its adapter and the gradients, replacements included, and its loss without."""
    assert not fusion_of(model).norms, "the oracle is the unfused model"
    scored = [one for one in rows if labelled_count([one])]
    loss = torch.stack([oracle_loss(model, one) for one in scored]).sum()
    loss.backward()
    gradients = {f"{item.path}.{item.role}.{item.key}": item.parameter.grad for item in adapter_parameters(model)}
    with disabled(model), torch.no_grad():
        silent = torch.stack([oracle_loss(model, one) for one in scored]).sum()
    return loss.detach(), gradients, silent


def test_a_packed_batch_needs_a_fused_model() -> None:
    model, rows = adapted(), short_rows()
    assert not can_take_packed(model, rows)
    with pytest.raises(AdapterStateError, match=r"cannot take rows laid end to end .*fuse\(\) was not called"):
        answer_loss(model, pack(rows))
    fused(model)
    assert can_take_packed(model, rows)
    answer_loss(model, pack(rows))
    unfuse(model)
    assert not can_take_packed(model, rows)
    with pytest.raises(AdapterStateError, match="cannot take rows laid end to end"):
        answer_loss(model, pack(rows))


def test_a_packed_batch_without_labels_is_refused() -> None:
    model = fused(adapted())
    with pytest.raises(DataError, match="no labelled token"):
        answer_loss(model, pack([row(0, 5, []), row(1, 4, [0])]))


@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_rows_longer_than_a_sliding_window_are_not_packed(family: str) -> None:
    model, rows = adapted(family, torch.float64, **WINDOWS[family]), short_rows()
    too_long = [*rows, row(9, 13, range(3, 13))]
    wanted = [lone(model, each) for each in (rows, too_long)]
    fused(model)
    # Up to the window nothing is hidden, and packing is right.
    assert can_take_packed(model, rows)
    assert_same(answer_loss(model, pack(rows))[0], model, wanted[0], torch.float64)
    # One token more, and the window would have to be looked at.
    assert not can_take_packed(model, too_long)
    with pytest.raises(DataError, match=r"a row has 13 tokens, this model's attention sees 12"):
        answer_loss(model, pack(too_long))
    assert_same(answer_loss(model, collate(too_long, 0))[0], model, wanted[1], torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_tokens", [1, 61, 4096])
def test_held_out_loss_of_a_fused_model_is_that_of_the_unfused(family: str, batch_tokens: int) -> None:
    model = adapted(family)
    rows = [one for one in mixed_rows() if labelled_count([one])]
    wanted = held_out_loss(model, rows, 0)
    report = held_out_loss(fused(model), rows, 0, batch_tokens=batch_tokens)
    assert report.loss == pytest.approx(wanted.loss, rel=1e-6)
    assert (report.labelled_tokens, report.rows) == (wanted.labelled_tokens, wanted.rows)


def test_held_out_loss_packs_where_it_can() -> None:
    model, rows = adapted(), short_rows()
    given: list[dict] = []
    fused(model).get_decoder().register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    held_out_loss(model, rows, 0)
    assert [len(each["documents"].lengths) for each in given] == [5]
    given.clear()
    unfuse(model)
    held_out_loss(model, rows, 0)
    assert all("documents" not in each for each in given)
