"""docs/lora.md: the worked example to 1e-12, the tables by counting, and the pictures by the numbers they carry."""

import ast
import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.meta_models import LLAMA, Q_AND_V, linear, llama_by_formula, llama_model, trained, trained_by_hand
from tests.printed import NUMBER, agrees

from luthier.core.lora import lora_linear

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/lora.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())  # where a sentence may break over lines
GIVEN, COLUMNS, ROWS = range(3)  # the example's blocks: what is given, h = W x, h = x W


# --- the worked example ------------------------------------------------------------------------------------------


def blocks() -> list[dict[str, np.ndarray]]:
    """Return the fenced blocks of the worked example, each as {name: numbers}."""
    section = TEXT.split("## One step by hand")[1].split("\n## ")[0]
    found = []
    for body in re.findall(r"```\n(.*?)```", section, re.DOTALL):
        lines = re.sub(r"\n +", " ", body).split("\n")
        pairs = [line.split("=") for line in lines if "=" in line]
        found.append({name.strip(): np.array(ast.literal_eval(value.strip()), dtype=np.float64) for name, value in pairs})
    return found


def step(rows: bool) -> dict[str, np.ndarray]:
    """Return one gradient step of the example in float64: the forward by matrices, the gradients by autograd."""
    given = {name: torch.tensor(value) for name, value in blocks()[GIVEN].items()}
    lora_A, lora_B = given["A"].requires_grad_(), given["B"].requires_grad_()

    def forward(lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = given["W0"] + lora_B @ lora_A
        h = given["x"] @ weight if rows else weight @ given["x"]
        return h, 0.5 * (h - given["t"]).square().sum()

    h, loss = forward(lora_A, lora_B)
    grad_A, grad_B, g = torch.autograd.grad(loss, (lora_A, lora_B, h))
    new_A, new_B = lora_A - 0.1 * grad_A, lora_B - 0.1 * grad_B
    out = {"h": h, "g": g, "L": loss, "dA": grad_A, "dB": grad_B, "A'": new_A, "B'": new_B}
    out |= {"W'": given["W0"] + new_B @ new_A, "L'": forward(new_A, new_B)[1]}
    return {name: value.detach().numpy() for name, value in out.items()}


@pytest.mark.parametrize("block", [COLUMNS, ROWS], ids=["h = W x", "h = x W"])
def test_the_worked_example_is_exact(block: int) -> None:
    want, printed = step(rows=block == ROWS), blocks()[block]
    assert printed.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(printed[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_the_given_matrices_fit_together() -> None:
    given = blocks()[GIVEN]
    np.testing.assert_allclose(given["W"], given["W0"] + given["B"] @ given["A"], rtol=0, atol=1e-12)


def test_the_worked_example_is_what_the_adapted_layer_computes() -> None:
    given = {name: torch.tensor(value) for name, value in blocks()[GIVEN].items()}
    lora_A, lora_B, x = given["A"].requires_grad_(), given["B"].requires_grad_(), given["x"][None]
    h = F.linear(x, given["W0"]) + lora_linear(x, lora_A, lora_B, 1.0)
    (0.5 * (h - given["t"]).square().sum()).backward()
    for got, name in ((h[0].detach(), "h"), (lora_A.grad, "dA"), (lora_B.grad, "dB")):
        np.testing.assert_allclose(got, blocks()[COLUMNS][name], rtol=0, atol=1e-12, err_msg=name)


def test_the_three_gradients_are_as_the_page_says() -> None:
    given, printed = blocks()[GIVEN], blocks()[COLUMNS]
    x, g = given["x"][:, None], printed["g"][:, None]
    np.testing.assert_allclose(given["B"].T @ g @ x.T, printed["dA"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(g @ (given["A"] @ x).T, printed["dB"], rtol=0, atol=1e-12)


# --- the tables --------------------------------------------------------------------------------------------------


def table_row(label: str) -> list[str]:
    """Return the numbers in the page's table row that starts with `label`."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", TEXT, re.MULTILINE)
    return NUMBER.findall(row)


@pytest.mark.parametrize(
    ("label", "size"), [("SmolLM2-135M", "SmolLM2"), ("LLaMA-7B", "7B"), ("LLaMA-65B", "65B")], ids=lambda text: text
)
def test_counts_are_the_plans_and_the_formulas(label: str, size: str) -> None:
    configurations = [(8, Q_AND_V), (8, "all-linear"), (16, "all-linear"), (64, "all-linear")]
    planned = [trained(llama_model(size), r, targets) for r, targets in configurations]
    by_hand = [trained_by_hand(shapes(size, targets), r) for r, targets in configurations]
    assert table_row(label) == [f"{count:,}" for count in (llama_by_formula(size), *planned)]
    assert planned == by_hand


def shapes(size: str, targets: list[str] | str) -> list[tuple[int, int]]:
    """Return the shapes of a Llama's adapted weights, from its configuration."""
    hidden, feed_forward, layers, heads, kv_heads, *_ = LLAMA[size]
    wide, narrow, mlp = (hidden, hidden), (hidden, hidden // heads * kv_heads), (hidden, feed_forward)
    return layers * ([wide, narrow] if targets == Q_AND_V else [wide, wide, narrow, narrow, mlp, mlp, mlp])


MEMORY = ["base weights", "float32 masters, or the adapter", "gradients", "Adam's two averages", "together"]


def memory() -> list[list[float]]:
    """Return GB by part (rows) and method (columns) for LLaMA-7B with r = 16 on all linear layers."""
    base, in_linear = llama_by_formula("7B"), sum(module.weight.numel() for _, module in linear(llama_model("7B")))
    adapter = trained_by_hand(shapes("7B", "all-linear"), 16)
    nf4_bytes = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # codes, 8-bit scales of blocks, float32 scales of 256 of those
    full, lora = (2 * base, 4 * base, 2 * base, 8 * base), (2 * base, 4 * adapter, 4 * adapter, 8 * adapter)
    qlora = (nf4_bytes * in_linear + 2 * (base - in_linear), *lora[1:])
    return [
        [part / 1e9 for part in parts] for parts in zip(*((*sizes, sum(sizes)) for sizes in (full, lora, qlora)), strict=True)
    ]


@pytest.mark.parametrize("row", range(5), ids=MEMORY)
def test_memory_adds_up(row: int) -> None:
    printed = table_row(MEMORY[row])
    assert len(printed) == 3
    assert all(agrees(number, value) for number, value in zip(printed, memory()[row], strict=True)), memory()[row]


# --- numbers in the text -------------------------------------------------------------------------------------------


def test_unmerged_layers_multiply_a_little_more() -> None:
    (printed,) = re.findall(r"r = 8 does ([\d.]+) % more multiplications", PROSE)
    assert agrees(printed, 100 * trained_by_hand([(4096, 4096)], 8) / 4096**2)


def bfloat16_rounding() -> float:
    """Return the size of bfloat16's rounding error relative to normally distributed weights."""
    # An even error within half a unit in the last of 8 significant bits has a variance of unit^2 / 12.
    weight = np.random.default_rng(0).normal(size=1_000_000)
    unit = 2.0 ** (np.floor(np.log2(np.abs(weight))) - 7)
    return math.sqrt((unit**2 / 12).mean() / (weight**2).mean())


def test_a_merged_weight_is_rounded_by_as_much_as_its_last_bit_says() -> None:
    one_percent, tenth = re.findall(r"with an error of (?:about )?([\d.]+) %", PROSE)
    assert agrees(one_percent, 100 * bfloat16_rounding() / 0.01)
    # Below that the error is no longer even, since most entries do not move at all: so the second one is measured.
    torch.manual_seed(0)
    base = (0.02 * torch.randn(512, 512)).bfloat16().double()
    delta = torch.randn(512, 8).double() @ torch.randn(8, 512).double()
    delta *= 0.001 * base.norm() / delta.norm()
    stored = (base + delta).bfloat16().double() - base
    assert float(100 * (stored - delta).norm() / delta.norm()) == pytest.approx(float(tenth), abs=2)


# --- the pictures ------------------------------------------------------------------------------------------------

PICTURES = ["trained-share", "update-size", "worked-example", "stored-update", "memory-by-part"]
Lines = dict[str, list[list[float]]]


def lines_of(picture: Path) -> Lines:
    """Return the numbers that a picture was drawn from, which it carries in its text field."""
    with Image.open(picture) as image:
        return json.loads(image.text["numbers"])


@pytest.fixture(scope="module")
def committed() -> dict[str, Lines]:
    return {name: lines_of(ROOT / f"docs/pictures/{name}.png") for name in PICTURES}


def test_the_page_shows_every_picture_and_no_other() -> None:
    assert sorted(re.findall(r"\(pictures/([\w-]+)\.png\)", TEXT)) == sorted(PICTURES)
    assert sorted(path.stem for path in (ROOT / "docs/pictures").iterdir()) == sorted(PICTURES)


def test_the_script_draws_what_is_committed(tmp_path: Path, committed: dict[str, Lines]) -> None:
    plots = load_script()
    plots.main(tmp_path)
    for name in PICTURES:
        fresh = lines_of(tmp_path / f"{name}.png")
        assert fresh.keys() == committed[name].keys()
        for label, points in fresh.items():
            # Another BLAS rounds differently, and a stored bfloat16 may then fall to the other side.
            np.testing.assert_allclose(points, committed[name][label], rtol=1e-3, err_msg=f"{name}, {label}")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_lora_plots", ROOT / "scripts/make_lora_plots.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawn_shares_are_counts_by_formula(committed: dict[str, Lines]) -> None:
    lines = committed["trained-share"]
    assert len(lines) == 6
    for label, size in (("SmolLM2-135M", "SmolLM2"), ("LLaMA-7B", "7B"), ("LLaMA-65B", "65B")):
        for what, targets in (("all linear layers", "all-linear"), ("q and v", Q_AND_V)):
            for r, share in lines[f"{label}, {what}"]:
                count = trained_by_hand(shapes(size, targets), int(r))
                assert share == pytest.approx(100 * count / llama_by_formula(size), rel=1e-12)


def test_the_drawn_update_is_as_large_as_its_variance_says(committed: dict[str, Lines]) -> None:
    # x ~ N(0, 1) and A even within 1 / sqrt(in): each of the r terms of B (A x) has variance 1 / 3.
    for label, power in (("alpha / r", -0.5), ("alpha / sqrt(r)", 0.0)):
        for r, spread in committed["update-size"][label]:
            assert spread == pytest.approx(16 / math.sqrt(3) * r**power, rel=0.05)


def test_the_drawn_losses_are_the_examples(committed: dict[str, Lines]) -> None:
    given = blocks()[GIVEN]
    for label, start in (("from the example's B", given["B"]), ("from B = 0, as adapters start", 0 * given["B"])):
        lora_A, lora_B, losses = given["A"], start, []
        for _ in committed["worked-example"][label]:
            g = (given["W0"] + lora_B @ lora_A) @ given["x"] - given["t"]
            losses.append(0.5 * (g**2).sum())
            lora_A, lora_B = (
                lora_A - 0.1 * np.outer(lora_B.T @ g, given["x"]),
                lora_B - 0.1 * np.outer(g, lora_A @ given["x"]),
            )
        np.testing.assert_allclose([y for _, y in committed["worked-example"][label]], losses, rtol=1e-9)
    assert [float(value) for value in (blocks()[COLUMNS]["L"], blocks()[COLUMNS]["L'"])] == pytest.approx(
        [y for _, y in committed["worked-example"]["from the example's B"][:2]], abs=1e-12
    )


def test_the_drawn_floor_is_bfloat16s_rounding(committed: dict[str, Lines]) -> None:
    # Independent errors of one size in n x n entries have a largest singular value of about 2 sqrt(n) times that size.
    floor = 2 * bfloat16_rounding() / math.sqrt(512)
    for share in (0.03, 0.01):
        points = committed["stored-update"][f"{100 * share:g} %"]
        assert points[8][1] == pytest.approx(floor, rel=0.05)
        assert math.sqrt(sum(y**2 for _, y in points[:8])) == pytest.approx(share, rel=0.01)
    # What the update has over what it and the rounding have together.
    kept = dict(committed["stored-update"]["energy of rank 8"])
    for share in (0.03, 0.01):
        assert kept[share] == pytest.approx(1 / (1 + (bfloat16_rounding() / share) ** 2), abs=0.003)


def test_the_drawn_memory_is_the_tables(committed: dict[str, Lines]) -> None:
    drawn = [[size for _, size in points] for points in committed["memory-by-part"].values()]
    np.testing.assert_allclose(drawn, memory()[:4], rtol=1e-12)
