"""docs/errata.md: every number that the page calls right is recomputed here, and held against the page to its last digit.

In the page's tables **bold** is what is right and `typewriter` what the reason rests on; both are read in the order of the row
and compared with what the table's function here returns. Sources: autograd in float64, models on the
meta device, luthier's own plan, formulas.
"""

import math
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.meta_models import Q_AND_V, linear, llama_by_formula, llama_model, parameters, trained, trained_by_hand
from tests.printed import NUMBER, agrees, flat, printed_numbers
from torch import Tensor, nn

from luthier.adapt import adapter_parameters, attach
from luthier.core.config import LoraConfig
from luthier.core.lora import lora_scaling

PAGE = Path(__file__).resolve().parents[2] / "docs/errata.md"
ROW = re.compile(r"^\| ([A-F]\d+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
ROWS = {key: printed_numbers(f"{right} | {reason}") for key, _, right, reason in ROW.findall(PAGE.read_text(encoding="utf-8"))}
GPT3 = 175_255.8e6  # parameters, by the paper's Table 4


# --- A: one step by hand, in float64 ---------------------------------------------------------------------------

W0 = torch.tensor([[1, 0, -1, 2], [0, 1, 1, -1], [2, -2, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
A = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, 0, 0.1]], dtype=torch.float64)
B = torch.tensor([[1, 0], [0, 1], [0.5, -0.5], [-1, 1]], dtype=torch.float64)
X = torch.tensor([[1, 0, 0, 0]], dtype=torch.float64)
TARGET = torch.ones(1, 4, dtype=torch.float64)
RATE = 0.1


@cache
def step_by_hand() -> dict[str, Tensor]:
    """Return one gradient step of y = x (W0 + B A), by autograd."""
    lora_A, lora_B, weight = A.clone().requires_grad_(), B.clone().requires_grad_(), W0.clone().requires_grad_()
    loss = 0.5 * (X @ (weight + lora_B @ lora_A) - TARGET).square().sum()
    grad_A, grad_B, grad_W = torch.autograd.grad(loss, (lora_A, lora_B, weight))
    new_A, new_B = A - RATE * grad_A, B - RATE * grad_B
    new_loss = 0.5 * (X @ (W0 + new_B @ new_A) - TARGET).square().sum()
    # The explanation's own way: 0.2 for the second error, and the other convention's formula for B.
    error = X @ (W0 + B @ A) - TARGET
    error[0, 1] = 0.2
    own_grad_B = error.T @ A[:, :1].T
    return {
        "loss": loss.detach(),
        "grad_A": grad_A,
        "grad_B": grad_B,
        "grad_W": grad_W,
        "new_A": new_A,
        "new_B": new_B,
        "new_loss": new_loss,
        "own_grad_B": own_grad_B,
        "own_A": A - RATE * (B.T @ X.T @ error),
        "own_B": B - RATE * own_grad_B,
    }


def a_rows() -> dict[str, list[Any]]:
    """Return the numbers of table A."""
    step, llama = step_by_hand(), llama_model("7B")
    new, own = step["new_B"] @ step["new_A"], step["own_B"] @ step["own_A"]
    own_as_printed = step["own_B"].mul(100).round().div(100) @ step["own_A"]
    sizes = [module.weight.numel() for _, module in linear(llama)]
    claimed, touched = 100 * trained_by_hand([(4096, 4096)], 8), 100 * 4096 * 4096
    everything = trained(llama, 8, "all-linear")
    return {
        "A1": [step["grad_A"][0, 1]],
        "A2": [step["grad_B"]],
        "A3": [step["new_A"][0, 1], step["new_B"], step["own_B"][2:]],
        "A4": [new[:2], own[:2]],
        "A5": [(W0 + new)[3, 2], W0 + new, step["new_loss"], (W0 + own)[3, 2], (W0 + own_as_printed)[3, 2]],
        "A7": [2 * step["loss"], step["grad_W"][0]],
        "A9": [100 * claimed / touched, claimed, touched, 100 * claimed / sum(sizes), 100 * claimed / parameters(llama)],
        "A10": [
            sizes.count(4096 * 4096),
            sizes.count(4096 * 11008),
            everything,
            100 * everything / (parameters(llama) + everything),
            sum(sizes),
        ],
    }


# --- counting ------------------------------------------------------------------------------------------------


@cache
def llama4_model(name: str = "Scout") -> nn.Module:
    """Return the text model of Llama 4 on the meta device. transformers' defaults are Scout's."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    maverick = {"num_local_experts": 128, "interleave_moe_layer_step": 2}
    with torch.device("meta"):
        return Llama4ForCausalLM(Llama4TextConfig(**(maverick if name == "Maverick" else {})))


def scout_by_formula() -> int:
    """Return Scout's parameters: 48 layers of attention, 16 experts and a shared one, a router, two norms."""
    hidden, narrow, expert = 5120, 1024, 8192
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 17 * 3 * hidden * expert + 16 * hidden + 2 * hidden
    return 2 * 202_048 * hidden + 48 * layer + hidden


@cache
def gpt3_attention() -> nn.Module:
    """Return the attention projections of GPT-3 on the meta device: 96 layers of four 12,288 x 12,288 weights."""
    with torch.device("meta"):
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return nn.ModuleList(nn.ModuleDict({name: nn.Linear(12_288, 12_288, bias=False) for name in names}) for _ in range(96))


# --- B to F --------------------------------------------------------------------------------------------------


def same_at_every_rank(multiple: int) -> float:
    """Return the scaling of alpha = multiple x r, which must be one number."""
    (scaling,) = {lora_scaling(r, multiple * r) for r in (1, 4, 8, 64)}
    return scaling


def b_rows() -> dict[str, list[Any]]:
    """Return the numbers of table B."""
    gpt3 = {r: trained(gpt3_attention(), r) for r in (1, 4, 8)}
    r2_on_v = trained(gpt3_attention(), 2, ["v_proj"])
    assert r2_on_v == gpt3[1]
    big = parameters(llama_model("65B"))
    nf4_bits = 4 + 8 / 64 + 32 / (64 * 256)
    x, y = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 64, dtype=torch.float64)
    weight = torch.zeros(64, 8, dtype=torch.float64, requires_grad=True)
    error = F.linear(x, weight) - y
    (gradient,) = torch.autograd.grad(error.square().mean(), weight)
    ratio = (gradient / (error.T @ x)).detach()
    assert ratio.std() < 1e-12
    return {
        "B1": [gpt3[8], 100 * gpt3[8] / GPT3, gpt3[1], 100 * gpt3[1] / GPT3],
        "B2": [100 * gpt3[1] / GPT3, gpt3[4], 100 * gpt3[4] / GPT3],
        "B3": [2 * GPT3 / 1e9, nf4_bits / 8 * GPT3 / 1e9],
        "B4": [math.ceil(12 * big / 80e9), big, 12 * big / 1e9, 16 * big / 1e9],
        "B6": [same_at_every_rank(multiple) for multiple in (1, 2)],
        "B8": [100 * trained_by_hand([(4096, 4096)], 64) / 4096**2, 100 * 64 / 4096],
        "B10": [fresh_update(8, 16)[1]],
        "B11": [ratio.mean(), 1 / ratio.mean()],
    }


def c_rows() -> dict[str, list[Any]]:
    """Return the numbers of table C."""
    from torch.utils.flop_counter import FlopCounterMode

    llama = llama_model("7B")
    base, (r8, r16) = parameters(llama), (trained(llama, r) for r in (8, 16))
    lines = [(count, base + count, 100 * count / (base + count)) for count in (r16, r8)]
    gpt3, wide = {r: trained(gpt3_attention(), r) for r in (1, 4, 8)}, trained(llama, 64, "all-linear")
    with torch.device("meta"):
        token, down, up = torch.empty(1, 4096), torch.empty(4096, 8), torch.empty(8, 4096)
    flops = []
    for compute in (lambda: token @ down @ up, lambda: down @ up):
        with FlopCounterMode(display=False) as counter:
            compute()
        flops.append(counter.get_total_flops() // 2)  # it counts a multiplication and an addition
    return {
        "C1": [*lines[0], *lines[1]],
        "C3": [
            *(base / r8, base / r16, GPT3 / gpt3[8], GPT3 / gpt3[4]),
            *(GPT3 / gpt3[1], 100 * gpt3[1] / GPT3, base / wide, 100 * wide / base),
        ],
        "C4": flops,
        "C7": [16 * base / 1e9, 6 * base / 1e9],
    }


def d_rows() -> dict[str, list[Any]]:
    """Return the numbers of table D."""
    scout, maverick = (trained(llama4_model(name), 8) for name in ("Scout", "Maverick"))
    base, small = parameters(llama4_model()), llama_model("3.2-3B")
    q_and_v = trained(small, 32)
    outputs = sum(module.out_features for path, module in linear(small) if path.endswith(tuple(Q_AND_V)))
    gpt3 = 2 * trained(gpt3_attention(), 4)  # bytes
    return {
        "D1": [scout, base + scout, 100 * scout / (base + scout), base],
        "D2": [2 * parameters(llama_model("2-70B")) / 1e9, parameters(llama_model("2-70B"))],
        "D3": [2 * parameters(llama_model(size)) / 1e9 for size in ("13B", "7B")],
        "D4": [100 * (1 - 32.5 / 43.1), parameters(small) / q_and_v, q_and_v, 2147 / 942],
        "D5": [1200 / 350],
        "D7": [maverick],
        "D9": [outputs, 100 * outputs / q_and_v],
        "D10": [lora_scaling(8, 32)],
        "D11": [2 * GPT3 / gpt3, gpt3 / 1e6, gpt3 / 2**20],
    }


def fresh_update(r: int, width: int) -> tuple[Tensor, float]:
    """Return a fresh adapter's A, and the largest number in its update."""
    attach(model := nn.ModuleDict({"layer": nn.Linear(width, 13, bias=False)}), LoraConfig(r=r, target_modules=["layer"]))
    lora_A, lora_B = (item.parameter.detach() for item in adapter_parameters(model))
    return lora_A, float((lora_B @ lora_A).abs().max())


def e_rows() -> dict[str, list[Any]]:
    """Return the numbers of table E."""
    lora_A, update = fresh_update(64, 4096)
    narrow = torch.nn.init.kaiming_uniform_(torch.empty(512, 576), a=math.sqrt(5))
    for drawn, width in ((lora_A, 4096), (narrow, 576)):
        assert drawn.std().item() == pytest.approx(1 / math.sqrt(3 * width), rel=0.01)
    r64 = trained_by_hand([(4096, 4096)], 64)
    return {
        "E1": [update],
        "E2": [100 * r64 / 4096**2, r64, 4096**2],
        "E3": [1 / math.sqrt(3 * 4096), 1 / math.sqrt(3 * 576), 1 / (3 * 0.01**2)],
    }


def f_rows() -> dict[str, list[Any]]:
    """Return the numbers of table F."""
    axes = torch.eye(5, dtype=torch.float64)
    cosines = torch.linalg.svdvals(axes[:, [0, 1]].T @ axes[:, [0, 2]])  # two planes with one direction in common
    distance2 = 2 - cosines.square().sum()
    assert cosines.square().sum() / 2 == 1 - distance2 / 2
    printed, right = ([6 + 6 * (1 - (t - 10 - late) / 35) ** 3 for t in (10, 45)] for late in (15, 0))  # T - t_f - t_i = 35
    quantile = torch.special.ndtri
    grid = [torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)[:-1] for n in (9, 8)]
    zero = torch.zeros(1, dtype=torch.float64)
    nf4 = torch.cat([quantile(grid[0]), zero, -quantile(grid[1])]).sort().values
    nf4 /= nf4.max()
    as_printed = quantile(torch.arange(17, dtype=torch.float64) / 17).unfold(0, 2, 1).mean(-1)
    assert len(nf4) == len(as_printed) == 16
    assert as_printed[0] == -math.inf
    gpt3, all_four = gpt3_attention(), [*Q_AND_V, "k_proj", "o_proj"]
    medium, large = (layers * 2 * 4 * (2 * width) for layers, width in ((24, 1024), (36, 1280)))
    return {
        "F1": [distance2, cosines.square().sum() / 2, (1 - distance2) / 2],
        "F2": [medium, large],
        "F3": [next(r for r in range(1, 9) if trained(gpt3, r, all_four) == trained(gpt3, 8)), trained(gpt3, 2, all_four)],
        "F4": [printed[0], printed[1], right[0], right[1]],
        "F5": [nf4[:3]],
    }


TABLES: dict[str, Callable[[], dict[str, list[Any]]]] = {
    "A": a_rows,
    "B": b_rows,
    "C": c_rows,
    "D": d_rows,
    "E": e_rows,
    "F": f_rows,
}


@cache
def recomputed(table: str) -> dict[str, list[Any]]:
    return TABLES[table]()


@pytest.mark.parametrize("row", [key for key, numbers in ROWS.items() if numbers])
def test_what_the_page_prints_is_what_comes_out(row: str) -> None:
    values = [float(value) for value in flat(recomputed(row[0])[row])]
    assert len(values) == len(ROWS[row]), (ROWS[row], values)
    wrong = [(printed, value) for printed, value in zip(ROWS[row], values, strict=True) if not agrees(printed, value)]
    assert not wrong


@pytest.mark.parametrize("table", TABLES)
def test_nothing_is_recomputed_for_a_row_that_is_not_there(table: str) -> None:
    assert set(recomputed(table)) == {key for key, numbers in ROWS.items() if numbers and key[0] == table}


def test_a_wrong_digit_on_the_page_is_seen() -> None:
    row = "| A1 | 0.2 | **-0.8** and r = 3 | `1,607` times, [[`1.5`]] |"
    assert [key for key, *_ in ROW.findall(row)] == ["A1"]
    assert printed_numbers(row) == ["-0.8", "1,607", "1.5"]
    assert agrees("-0.8", -0.8)
    assert agrees("1,607", 1606.56)
    assert agrees("0.0622", 0.06220)
    assert not agrees("-0.8", 0.8)
    assert not agrees("1,607", 1605.9)
    assert not agrees("2.21413629", 2.21413628)


# --- the counts once more, in other ways -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("7B", 6_738_415_616),
        ("13B", 13_015_864_320),
        ("65B", 65_285_660_672),
        ("2-70B", 68_976_648_192),
        ("3.2-3B", 3_212_749_824),
    ],
)
def test_a_llama_counts_as_its_shapes_say(size: str, count: int) -> None:
    assert parameters(llama_model(size)) == llama_by_formula(size) == count


def test_scout_counts_as_its_shapes_say() -> None:
    assert parameters(llama4_model()) == scout_by_formula() == 107_769_861_120
    assert trained(llama4_model(), 8) == 48 * trained_by_hand([(5120, 5120), (5120, 1024)], 8) == 6_291_456


@pytest.mark.parametrize(
    ("r", "targets", "count"),
    [
        (8, Q_AND_V, 4_194_304),
        (16, Q_AND_V, 8_388_608),
        (8, "all-linear", 19_988_480),
        (16, "all-linear", 39_976_960),
        (64, "all-linear", 159_907_840),
    ],
)
def test_adapters_of_llama_7b_count_as_planned_and_by_formula(r: int, targets: list[str] | str, count: int) -> None:
    wide = [(4096, 4096)] * (2 if targets == Q_AND_V else 4)
    shapes = wide if targets == Q_AND_V else [*wide, *[(4096, 11008)] * 3]
    assert trained(llama_model("7B"), r, targets) == 32 * trained_by_hand(shapes, r) == count


def test_an_attached_adapter_has_as_many_numbers_as_were_planned() -> None:
    from copy import deepcopy

    model = deepcopy(llama_model("7B"))
    planned = attach(model, LoraConfig(r=8, target_modules=Q_AND_V))
    assert sum(item.parameter.numel() for item in adapter_parameters(model)) == planned.num_parameters == 4_194_304
    assert {item.parameter.device.type for item in adapter_parameters(model)} == {"meta"}


@pytest.mark.parametrize(
    ("r", "targets", "count"),
    [
        (1, Q_AND_V, 4_718_592),
        (2, ["v_proj"], 4_718_592),
        (4, Q_AND_V, 18_874_368),
        (8, Q_AND_V, 37_748_736),
    ],
)
def test_adapters_of_gpt3_count_as_in_the_papers_formula(r: int, targets: list[str], count: int) -> None:
    # Section 5.1: 2 x (number of adapted weights) x d_model x r.
    assert trained(gpt3_attention(), r, targets) == 2 * (96 * len(targets)) * 12_288 * r == count


def test_what_the_explanations_have_right_is_right() -> None:
    text = PAGE.read_text(encoding="utf-8").split("## What they have right")[1]
    counts = [trained_by_hand([(4096, 4096)], r) for r in (8, 16, 64)]
    whole = 4096 * 4096
    assert [f"{count:,}" for count in (*counts, whole)] == NUMBER.findall(text)[:4]
    assert f"{whole // counts[0]} times fewer at r = 8" in text
    assert f"{4 * llama_by_formula('7B') / 1e9:.0f} GB" in text.replace("\n", " ")


def test_q_and_v_of_scout_and_maverick_have_the_same_shapes() -> None:
    shapes = [
        {path: tuple(module.weight.shape) for path, module in linear(llama4_model(name)) if path.endswith(tuple(Q_AND_V))}
        for name in ("Scout", "Maverick")
    ]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == 96


# --- what the explanation printed can be traced ------------------------------------------------------------------


def test_the_printed_gradient_of_b_is_the_other_conventions_formula() -> None:
    printed = torch.tensor([[0.01, -0.01], [0.02, -0.02], [-0.17, 0.17], [0.14, -0.14]], dtype=torch.float64)
    torch.testing.assert_close(step_by_hand()["own_grad_B"], printed, rtol=0, atol=1e-12)


def test_both_formulas_of_the_gradient_are_autograds() -> None:
    step, error = step_by_hand(), X @ (W0 + B @ A) - TARGET
    torch.testing.assert_close(step["grad_A"], B.T @ X.T @ error, rtol=0, atol=1e-12)
    torch.testing.assert_close(step["grad_B"], X.T @ (error @ A.T), rtol=0, atol=1e-12)
    torch.testing.assert_close(step["grad_W"], X.T @ error, rtol=0, atol=1e-12)
