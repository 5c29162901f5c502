"""docs/combinations.md tells the truth: yes is the dense expression in float64, no an error with the words that stand there."""

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt.attaching import attach
from luthier.adapt.loftq import attach_loftq
from luthier.adapt.state import adapter_parameters
from luthier.core.errors import LuthierError
from luthier.data.batches import Batch
from luthier.quant import dequantize_nf4_plain
from luthier.train.eva import start_from_inputs
from luthier.train.groups import freeze_lora_A, parameter_groups
from luthier.train.settings import RunSettings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "combinations.md"
V, E, TOKENS = 29, 12, 7
COLUMNS = {
    "Linear": "linear",
    "Conv1D": "turned",
    "tied head": "head",
    "Embedding": "table",
    "Conv1d, 2d, 3d": "window",
    "MultiheadAttention": "mix",
}
EVERY = f"({'|'.join(COLUMNS.values())})"
WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "LoRA": {},
    "rsLoRA": {"lora": {"use_rslora": True}},
    "DoRA": {"lora": {"use_dora": True}},
    "AdaLoRA": {"lora": {"peft_type": "ADALORA", "init_r": 4, "target_r": 2}},
    "LoRA+": {"train": {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 1e-5}},
    "LoRA-FA": {"train": {"freeze_A": True}},
    "lora_bias": {"lora": {"lora_bias": True}},
    "lora_dropout": {"lora": {"lora_dropout": 0.3}},
    "rank_pattern": {"lora": {"rank_pattern": {EVERY: 2}}},
    "alpha_pattern": {"lora": {"alpha_pattern": {EVERY: 5}}},
    **{f"init {init}": {"lora": {"init_lora_weights": init}} for init in ("gaussian", "orthogonal", "olora", "pissa", "eva")},
    "init loftq": {"lora": {"init_lora_weights": "loftq"}, "top": {"quantize": "nf4"}},
}


def cells(section: str) -> Iterator[tuple[str, str, str]]:
    """Yield (row, column, words of the refusal, or "") of the table below a heading; empty cells are left out."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    reasons = dict(re.findall(r'^(\d+)\. "([^"]+)"', text, re.MULTILINE))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    for row, *rest in lines[2:]:
        for column, cell in zip(lines[0][1:], rest, strict=True):
            if cell:
                answer, _, number = cell.partition(" ")
                assert (answer, number) == ("yes", "") or answer == "no", cell
                yield row, column, reasons[number] if number else ""


class Everything(nn.Module):
    """One layer of each kind in a row; the head is tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, E)
        self.window = nn.Conv1d(E, E, 3, padding=1)
        self.mix = nn.MultiheadAttention(E, 2, batch_first=True)
        self.turned = Conv1D(18, E)
        self.linear = nn.Linear(18, E)
        self.head = nn.Linear(E, V, bias=False)
        self.head.weight = self.table.weight
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.4 if parameter.ndim > 1 else 0.1, generator=torch.Generator().manual_seed(len(name)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = torch.tanh(self.window(x.transpose(1, 2))).transpose(1, 2)
        x = (x + self.mix(x, x, x, need_weights=False)[0]).contiguous()
        return self.head(torch.tanh(self.linear(torch.tanh(self.turned(x)))))


def settings_of(name: str, *words: str) -> RunSettings:
    """Return settings of a run with the methods of these words on the layer `name`."""
    lora: dict[str, Any] = {"target_modules": [name], "lora_alpha": 9, "r": 4}
    train: dict[str, Any] = {}
    top: dict[str, Any] = {}
    for word in words:
        top |= WORDS[word].get("top", {})
        lora |= WORDS[word].get("lora", {})
        train |= WORDS[word].get("train", {})
    if "peft_type" in lora:
        del lora["r"]
    return RunSettings(model="none", out="none", data={"path": "none"}, lora=lora, train=train, **top)


def begun(name: str, *words: str) -> tuple[nn.Module, nn.Module, RunSettings]:
    """Return the base, the model with a fresh adapter as a run would begin it, and the settings."""
    settings = settings_of(name, *words)
    torch.manual_seed(0)
    model = Everything().eval()
    base = copy.deepcopy(model)
    if settings.lora.init_lora_weights == "loftq":
        attach_loftq(model, settings.lora)
    else:
        attach(model, settings.lora)
    if settings.lora.init_lora_weights == "eva":
        ids = torch.arange(4 * TOKENS).view(4, TOKENS) % V
        start_from_inputs(model, "default", [Batch(ids, torch.ones_like(ids), ids)])
    if settings.train.freeze_A:
        freeze_lora_A(adapter_parameters(model))
    return base, model, settings


def dense_parameters(base: nn.Module, name: str, numbers: dict[str, Tensor], settings: RunSettings) -> dict[str, Tensor]:
    """Return the layer's weight and bias with the adapter written into them, from its numbers and the settings alone."""
    lora, layer = settings.lora, base.get_submodule(name)
    A, B = numbers["lora_A"], numbers["lora_B"]
    alpha = 5 if lora.alpha_pattern else 9
    r = len(A)
    scaling = alpha / (4 + 1e-5) if "lora_E" in numbers else alpha / (r**0.5 if lora.use_rslora else r)
    if name == "window":
        weight = layer.weight + scaling * torch.einsum("or,rik->oik", B.squeeze(2), A)
        if "magnitude" in numbers:  # of a filter: the norm over all that makes one output
            weight = numbers["magnitude"].view(-1, 1, 1) * weight / weight.detach().norm(dim=(1, 2), keepdim=True)
        return {"window.weight": weight, "window.bias": layer.bias + scaling * numbers.get("lora_bias", torch.zeros(1))}
    if name == "mix":
        out = layer.out_proj.weight + scaling * numbers["out.lora_B"] @ numbers["out.lora_A"]
        return {"mix.in_proj_weight": layer.in_proj_weight + scaling * B @ A, "mix.out_proj.weight": out}
    delta = B @ (A * numbers["lora_E"] if "lora_E" in numbers else A)
    if "start_A" in numbers:
        delta = delta - numbers["start_B"] @ numbers["start_A"]
    turned = name in ("turned", "table")
    weight = (layer.weight.T if turned else layer.weight) + scaling * delta
    if "magnitude" in numbers:
        weight = numbers["magnitude"][:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    found = {f"{name}.weight": weight.T if turned else weight}
    if "lora_bias" in numbers:
        found[f"{name}.bias"] = scaling * numbers["lora_bias"] + (0 if layer.bias is None else layer.bias)
    return found


def compare_with_dense(name: str, *words: str) -> None:
    """Fresh: the base to the bit. After learning: output and gradients of the dense expression in float64."""
    base, model, settings = begun(name, *words)
    ids = torch.randint(0, V, (3, TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():  # torch's convolutions and attention take another road where something has a gradient
        fresh, exact = model(ids), base(ids)
        if settings.quantize == "nf4":
            base.linear.weight.copy_(dequantize_nf4_plain(model.linear.weight.stored))
            assert (fresh - exact).norm() < (base(ids) - exact).norm(), "the pair gives back a part of what 4 bits lost"
        else:
            assert torch.equal(fresh, exact), "a fresh adapter changes nothing"
    items = list(adapter_parameters(model))
    assert {item.path for item in items} == {name}
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for item in items:
            item.parameter.add_(0.2 * torch.randn(item.parameter.shape, generator=draw))
    model, base = model.double(), base.double().requires_grad_(False)
    items = list(adapter_parameters(model))
    numbers = {item.role: item.parameter.detach().clone().requires_grad_(item.parameter.requires_grad) for item in items}
    pair = model.get_submodule(name).lora["default"]
    starts = {key: tensor for key, tensor in pair.named_buffers() if key.startswith("start_")}
    if name == "head":  # the pair is the head's alone, so the dense model has a head of its own
        base.head.weight = nn.Parameter(base.head.weight.detach().clone(), requires_grad=False)
        if "lora_bias" in numbers:
            base.head.register_parameter("bias", nn.Parameter(torch.zeros(V).double(), requires_grad=False))
    assert len(numbers["lora_A"]) == (2 if settings.lora.rank_pattern else 4)
    expected = torch.func.functional_call(
        base, dense_parameters(base, name, numbers | starts, settings), (ids,), tie_weights=False
    )
    found = model(ids)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (found - base(ids)).abs().max() > 1e-2 * expected.abs().max(), "nothing was learnt: nothing was compared"
    trained = [item for item in items if item.parameter.requires_grad]
    assert ("lora_A" in [item.factor for item in trained]) != settings.train.freeze_A
    ours = torch.autograd.grad(found.square().mean(), [item.parameter for item in trained])
    dense = torch.autograd.grad(expected.square().mean(), [numbers[item.role] for item in trained])
    for item, mine, theirs in zip(trained, ours, dense, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm(), item.role
    if settings.lora.lora_dropout:
        model.train()
        assert not torch.equal(model(ids), found), "dropout drops nothing"
    rates = {id(each): group["lr_ratio"] for group in parameter_groups(items, settings.train) for each in group["params"]}
    assert len(rates) == len(trained), "each trained number is in one group"
    for item in trained if settings.train.loraplus_lr_ratio else []:
        fast = item.factor == "lora_B" or item.parameter.ndim == 1
        wanted = 1e-5 / settings.train.learning_rate if name == "table" else 4 if fast else 1
        assert rates[id(item.parameter)] == pytest.approx(wanted), item.role


@pytest.mark.parametrize(("row", "column", "told"), list(cells("Which method on which layer")))
def test_a_method_on_a_layer(row: str, column: str, told: str, caplog: pytest.LogCaptureFixture) -> None:
    name = COLUMNS[column]
    if not told:
        compare_with_dense(name, row)
    elif row == "lora_dropout":
        with caplog.at_level(logging.WARNING):
            begun(name, row)
        assert told in caplog.text
    else:
        with pytest.raises(LuthierError) as caught:
            begun(name, row)
        assert told in str(caught.value)


@pytest.mark.parametrize(("row", "column", "told"), list(cells("Which two together")))
def test_two_methods_together(row: str, column: str, told: str) -> None:
    if not told:
        compare_with_dense("linear", row, column)
    else:
        with pytest.raises(LuthierError) as caught:
            begun("linear", row, column)
        assert told in str(caught.value)


def test_the_tables_are_whole() -> None:
    first, second = list(cells("Which method on which layer")), list(cells("Which two together"))
    assert {row for row, _, _ in first} == set(WORDS)
    assert {column for _, column, _ in first} == set(COLUMNS)
    assert len(first) == len(WORDS) * len(COLUMNS)
    inits = [word for word in WORDS if word.startswith("init")]
    methods = [word for word in WORDS if word not in ("LoRA", *inits)]
    pairs = {frozenset((row, column)) for row, column, _ in second}
    assert len(pairs) == len(second) == len(methods) * (len(methods) - 1) // 2 + len(inits) * len(methods)
