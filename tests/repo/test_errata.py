"""The page of errata: every number in bold is worked out again here, by another way than the page's own words."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.adapt.planning import plan
from luthier.core.config import LoraConfig
from luthier.core.lora import init_linear_pair, lora_scaling

A = [[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, 0.0, 0.1]]
B = [[1.0, 0.0], [0.0, 1.0], [0.5, -0.5], [-1.0, 1.0]]
W_EFF = [[1.1, 0.2, -0.7, 2.4], [-0.1, 0.8, 1.0, -0.9], [2.1, -1.8, 0.15, 0.15], [0.8, 0.6, 0.7, 0.7]]
ERROR = [0.1, -0.8, -1.7, 1.4]


@pytest.fixture(scope="module")
def llama_7b() -> torch.nn.Module:
    """LLaMA-7B from its configuration, without a byte of weights."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(vocab_size=32000, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def page(root: Path) -> dict[str, list[str]]:
    """Row -> the numbers in bold of that row."""
    rows = re.findall(r"^\| ([\w.-]+) \|(.*)\|$", (root / "docs" / "errata.md").read_text(), flags=re.MULTILINE)
    return {name: re.findall(r"\*\*([^*]+)\*\*", text) for name, text in rows if name != "id" and not set(name) <= {"-"}}


def worked_step() -> dict[str, list[float]]:
    """One step of gradient descent on the example, by torch's own gradients in float64."""
    lora_A, lora_B = (torch.tensor(each, dtype=torch.float64, requires_grad=True) for each in (A, B))
    x = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    base = torch.tensor(W_EFF, dtype=torch.float64) - (lora_B @ lora_A).detach()
    target = x @ torch.tensor(W_EFF, dtype=torch.float64) - torch.tensor(ERROR, dtype=torch.float64)

    def loss() -> torch.Tensor:
        return 0.5 * (x @ (base + lora_B @ lora_A) - target).square().sum()

    before = loss()
    d_A, d_B = torch.autograd.grad(before, [lora_A, lora_B])
    with torch.no_grad():
        lora_A -= 0.1 * d_A
        lora_B -= 0.1 * d_B
    assert not d_B[1:].any()
    return {
        "step-loss": [before.item(), 2 * before.item()],
        "step-dA": [float(d_A[0, 1])],
        "step-dB": [float(d_B[0, 0]), float(d_B[0, 1])],
        "step-A": [lora_A[0, 1].item()],
        "step-after": [loss().item()],
    }


def of_llama(model: torch.nn.Module, r: int, targets: list[str] | str = "all-linear") -> tuple[int, int]:
    """Return (trained, all) as luthier plans it on the meta device."""
    planned = plan(model, LoraConfig(r=r, target_modules=targets))
    return planned.num_parameters, planned.num_base_parameters + planned.num_parameters


def pairs(layers: int, r: int, *shapes: tuple[int, int]) -> int:
    return layers * sum(r * (inputs + outputs) for inputs, outputs in shapes)


def test_every_row_with_a_number_is_worked_out(page: dict[str, list[str]], llama_7b: torch.nn.Module) -> None:
    queries_and_values = ["q_proj", "v_proj"]
    r8, r16 = (of_llama(llama_7b, r, queries_and_values) for r in (8, 16))
    base = sum(parameter.numel() for parameter in llama_7b.parameters())
    square = (12288, 12288)
    gpt3 = 175_255.8e6
    _, lora_B = init_linear_pair(8, 64, 64, True, torch.device("cpu"))
    found: dict[str, list[float | str]] = worked_step() | {
        "llama-r16": [r16[0], r16[1], round(100 * r16[0] / r16[1], 4)],
        "llama-all": [of_llama(llama_7b, 8)[0]],
        "touched": [100 * pairs(100, 8, (4096, 4096)) / (100 * 4096**2)],
        "gpt3-r8": [pairs(96, 8, square, square)],
        "gpt3-4.7m": [pairs(96, 1, square, square)],
        "gpt3-fewer": [math.floor(gpt3 / pairs(96, 4, square, square))],
        "llama-fewer": [round(base / r8[0]), round(base / r16[0])],
        "paper-37.7m": [pairs(96, 2, *[square] * 4)],
        "gpt2": [pairs(24, 4, (1024, 1024), (1024, 1024)), pairs(36, 4, (1280, 1280), (1280, 1280))],
        "scout": [pairs(48, 8, (5120, 40 * 128), (5120, 8 * 128))],
        "gpt3-memory": [round(gpt3 * 2 / 1e9, 1)],
        "65b-full": [round(65_285_660_672 * 12 / 1e9), math.ceil(65_285_660_672 * 12 / 80e9)],
        "70b-lora": [round(68.98e9 * 2 / 1e9)],
        "13b-4090": [round(13_015_864_320 * 2 / 1e9, 1)],
        "memory-saved": [round(1200 / 350, 2)],
        "faster": [round(100 * (43.1 / 32.5 - 1), 1)],
        "rank-share": [100 * 2 * 64 / 4096],
        "std": [round(1 / (3 * 0.01**2))],
        "start": [float(lora_B.abs().max())],
        "rslora": [lora_scaling(1, 16) / (lora_scaling(64, 16) * math.sqrt(64))],  # B A x of normal numbers grows with sqrt(r)
        "adalora-budget": [round((1 - (10 - 10 - 15) / (60 - 10 - 15)) ** 3, 3)],
    }
    assert {name for name, numbers in page.items() if numbers} == set(found)
    for name, numbers in found.items():
        printed = [float(re.sub(r"[, ]|is.*", "", number)) for number in page[name]]
        assert printed == pytest.approx(numbers, rel=1e-9, abs=1e-12), name


def test_rows_of_the_same_name_would_hide_each_other(root: Path) -> None:
    names = re.findall(r"^\| ([\w.-]+) \|", (root / "docs" / "errata.md").read_text(), flags=re.MULTILINE)
    counted = [name for name in names if name != "id" and not set(name) <= {"-"}]
    assert len(counted) == len(set(counted)) > 20
