"""Counts are those of the worked figures in the research notes (`docs/errata.md`), from configurations alone."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.meta_models import LLAMA, llama_model, parameters

from luthier.adapt import plan
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.inspect import num_parameters, rank_table
from luthier.inspect.counts import quantisable, with_rank
from luthier.models import meta_model

Q_AND_V = ["q_proj", "v_proj"]
GOLDEN = [  # model, settings, trained
    ("7B", {"r": 8, "target_modules": Q_AND_V}, 4_194_304),
    ("7B", {"r": 16, "target_modules": Q_AND_V}, 8_388_608),
    ("7B", {"r": 8}, 19_988_480),
    ("7B", {"r": 16}, 39_976_960),
    ("7B", {"r": 64}, 159_907_840),
    ("SmolLM2", {"r": 8, "target_modules": Q_AND_V}, 460_800),
    ("SmolLM2", {"r": 8}, 2_442_240),
    ("SmolLM2", {"r": 16}, 4_884_480),
    ("3.2-3B", {"r": 32, "target_modules": Q_AND_V}, 9_175_040),
]


@pytest.mark.parametrize(("size", "settings", "trained"), GOLDEN)
def test_golden_counts(size: str, settings: dict[str, Any], trained: int) -> None:
    config = LoraConfig(**settings)
    (row,) = rank_table(llama_model(size), config, [config.r])
    assert row.num_trained == row.num_parameters == trained


@pytest.mark.parametrize(("size", "total"), [("7B", 6_738_415_616), ("SmolLM2", 134_515_008), ("65B", 65_285_660_672)])
def test_totals_count_a_tied_table_once(size: str, total: int) -> None:
    assert num_parameters(llama_model(size)) == total


def test_llama_3_2_3b_with_its_adapter_is_the_total_of_pefts_result_file() -> None:
    model = llama_model("3.2-3B")
    (row,) = rank_table(model, LoraConfig(target_modules=Q_AND_V), [32])
    assert num_parameters(model) + row.num_parameters == 3_221_924_864


def test_a_hundred_billion_parameters_are_counted_in_two_gibibytes() -> None:
    """Llama-4-Scout's text model, whose 107.8e9 parameters would fill 200 GiB."""
    script = """
import torch
from pathlib import Path
from transformers import Llama4TextConfig
from luthier.core.config import LoraConfig
from luthier.inspect import num_parameters, rank_table
from luthier.models import meta_model
model = meta_model(Llama4TextConfig(), torch.bfloat16)
(row,) = rank_table(model, LoraConfig(target_modules=["q_proj", "v_proj"]), [8])
# Not getrusage: its peak outlives exec, so it would be that of the process which started this one.
(peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(num_parameters(model), row.num_trained, peak)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    total, trained, peak_kib = map(int, done.stdout.split())
    assert (total, trained) == (107_769_861_120, 6_291_456)
    assert peak_kib < 2 * 2**20


def test_dora_adds_one_number_for_each_output() -> None:
    hidden, feed_forward, layers, heads, kv_heads, _, _ = LLAMA["SmolLM2"]
    outputs = layers * (2 * hidden + 2 * hidden // heads * kv_heads + 2 * feed_forward + hidden)
    (plain,), (dora,) = (rank_table(llama_model("SmolLM2"), LoraConfig(use_dora=use), [8]) for use in (False, True))
    assert dora.num_trained - plain.num_trained == outputs


def test_adalora_begins_with_half_as_much_again_and_a_size_for_each_triplet() -> None:
    (row,) = rank_table(llama_model("SmolLM2"), AdaLoraConfig(), [8])
    assert row.num_trained == 2_442_240 // 8 * 12 + 12 * 7 * 30


def test_embeddings_and_head_count_as_any_matrix_and_a_tied_head_is_named() -> None:
    r = 4
    for size, tied in (("7B", False), ("SmolLM2", True)):
        hidden, _, _, _, _, vocab, is_tied = LLAMA[size]
        assert is_tied == tied
        model = llama_model(size)
        table = plan(model, LoraConfig(r=r, target_modules=["embed_tokens"]))
        head = plan(model, LoraConfig(r=r, target_modules=["lm_head"]))
        assert table.num_parameters == head.num_parameters == r * (hidden + vocab)
        assert any("share" in warning or "tied" in warning for warning in (*table.warnings, *head.warnings)) == tied


def test_frozen_A_leaves_only_B_to_be_trained() -> None:
    model = llama_model("SmolLM2")
    planned = plan(model, LoraConfig(r=8))
    (row,) = rank_table(model, LoraConfig(), [8], freeze_A=True)
    assert row.num_trained == sum(8 * layer.out_features for layer in planned.layers)
    assert row.num_parameters == planned.num_parameters


def test_state_is_sixteen_bytes_for_each_trained_number() -> None:
    (row,) = rank_table(llama_model("SmolLM2"), LoraConfig(), [8])
    assert row.state_bytes == 16 * row.num_trained
    assert row.file_bytes == 4 * row.num_parameters


def test_what_qlora_quantises_is_every_linear_weight_but_the_head() -> None:
    for size, linear in (("7B", 6_476_005_376), ("SmolLM2", 106_168_320)):
        model = llama_model(size)
        assert sum(quantisable(model).values()) == linear
        assert parameters(model) > linear


def test_ranks_of_adalora_are_those_it_aims_at() -> None:
    config = with_rank(AdaLoraConfig(), 5)
    assert isinstance(config, AdaLoraConfig)
    assert (config.target_r, config.init_r) == (5, 8)


def test_counting_needs_no_numbers() -> None:
    assert all(parameter.device == torch.device("meta") for parameter in llama_model("7B").parameters())


def test_pairs_of_a_stack_of_experts_count_for_every_expert() -> None:
    """Mixtral: 8 experts with gate and up (14336 x 2, 4096) and down (4096, 14336) in each layer, by hand."""
    from transformers import MixtralConfig

    r, layers, experts, hidden, wide = 4, 2, 8, 4096, 14336
    model = meta_model(MixtralConfig(num_hidden_layers=layers), torch.bfloat16)
    config = LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    (row,) = rank_table(model, config, [r])
    (frozen,) = rank_table(model, config, [r], freeze_A=True)
    assert row.num_trained == layers * experts * r * ((hidden + 2 * wide) + (wide + hidden))
    assert frozen.num_trained == layers * experts * r * (2 * wide + hidden)
