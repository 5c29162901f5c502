"""Plans against figures that others published, and what must hold between plans.

Bands: figures that were measured (PEFT's benchmark) within 15 %, read off a plot (QLoRA's figure 6) within 15 %, rules of thumb
(LLaMA-Factory's table) within 30 %, as the research notes state them.
"""

from collections.abc import Callable

import pytest
import torch
from tests.meta_models import llama_model
from transformers import Qwen3MoeConfig

from luthier.adapt import quantize_linears
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError
from luthier.inspect import Planner, Setting, StepShape
from luthier.inspect.memory_plan import CUDA_BYTES, Growth
from luthier.models import meta_model
from luthier.ops.packed import PackedTensor

GIB, GB = 2**30, 1e9


def peak(
    size: str,
    method: str,
    rows: int,
    length: int,
    *,
    r: int = 8,
    targets: list[str] | str = "all-linear",
    checkpointing: bool = False,
) -> int:
    """Return the planned peak on a GPU in bfloat16, as PEFT and a transformers Trainer compute."""
    shape = StepShape(rows, length, "peft", checkpointing, "cuda")
    planner = Planner(llama_model(size).to(torch.bfloat16), LoraConfig(r=r, target_modules=targets))
    return planner.plan(Setting(method, shape)).peak_bytes  # type: ignore[arg-type]


def test_pefts_benchmark_of_llama_3_2_3b() -> None:
    """Max reserved 20.76 GiB with LoRA, 36.2 GiB with full fine-tuning (4 rows of 768 tokens, no checkpointing)."""
    assert peak("3.2-3B", "lora", 4, 768, r=32, targets=["q_proj", "v_proj"]) / GIB == pytest.approx(20.76, rel=0.15)
    assert peak("3.2-3B", "full", 4, 768) / GIB == pytest.approx(36.2, rel=0.15)


@pytest.mark.parametrize(("size", "published"), [("7B", 6.9), ("13B", 11.3), ("65B", 45.0)])
def test_qloras_figure_6(size: str, published: float) -> None:
    """One row of 512 tokens, r=64 on all linear layers, checkpointing. The figure adds up tensors, without CUDA's own part."""
    tensors = peak(size, "qlora", 1, 512, r=64, checkpointing=True) - CUDA_BYTES
    assert tensors / GB == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("length", "published"), [(1024, 6), (2048, 7), (4096, 9), (8192, 12), (16384, 19), (32768, 32)])
def test_llama_factorys_lengths(length: int, published: float) -> None:
    """LLaMA-2-7B in 4 bits, r=8 on all linear layers, one row; a rule of thumb in whole gigabytes."""
    assert peak("7B", "qlora", 1, length, checkpointing=True) / GIB == pytest.approx(published, rel=0.3)


def test_full_fine_tuning_of_65b_needs_more_than_780_gb() -> None:
    """16-bit weights and gradients, float32 moments: twelve bytes a parameter."""
    shape = StepShape(1, 64, "peft", True, "cuda")
    found = Planner(llama_model("65B").to(torch.bfloat16), LoraConfig()).plan(Setting("full", shape, moment_bytes=4))
    static = found.weight_bytes + found.gradient_bytes + found.moment_bytes
    assert static == 12 * 65_285_660_672
    assert found.peak_bytes > 780 * GB


def test_double_quantised_nf4_takes_4_127_bits_of_each_linear_weight() -> None:
    found = Planner(llama_model("7B").to(torch.bfloat16), LoraConfig()).plan(Setting("qlora", StepShape(1, 16)))
    linear, total = 6_476_005_376, 6_738_415_616
    assert found.weight_bytes == pytest.approx(linear * 4.127 / 8 + 2 * (total - linear), rel=1e-5)


@pytest.mark.parametrize("hidden", [48, 64])
@pytest.mark.parametrize("tied", [True, False])
def test_planned_weights_are_the_storages_that_loaded_ones_have(
    tiny_llama: Callable[..., torch.nn.Module], hidden: int, tied: bool
) -> None:
    model = tiny_llama(hidden=hidden, heads=4, dtype=torch.bfloat16, tie_word_embeddings=tied)
    planner = Planner(meta_model(model.config, torch.bfloat16), LoraConfig(r=2))
    planned = {method: planner.plan(Setting(method, StepShape(1, 16))).weight_bytes for method in ("lora", "qlora")}  # type: ignore[arg-type]
    assert planned["lora"] == sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
    quantize_linears(model)
    held = 0
    for parameter in model.parameters():
        tensors = parameter.stored.tensors.values() if isinstance(parameter, PackedTensor) else [parameter]
        held += sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert planned["qlora"] == held < planned["lora"]


def test_growth_predicts_larger_plans() -> None:
    planner = Planner(llama_model("SmolLM2"), LoraConfig())
    for checkpointing in (False, True):
        setting = Setting("lora", StepShape(2, 256, checkpointing=checkpointing))
        growth = planner.growth(setting)
        assert growth is not None
        for rows, length in ((7, 256), (2, 900)):
            real = planner.plan(Setting("lora", StepShape(rows, length, checkpointing=checkpointing))).peak_bytes
            known = growth.peak_bytes + (rows - 2) * growth.row_bytes + (length - 256) * growth.length_bytes
            assert 0.99 * real <= known <= 1.1 * real  # the head works in chunks, so it grows less than it begins
        assert growth.largest_rows(growth.peak_bytes) == 2
        assert growth.largest_length(growth.peak_bytes - 1) == 255
        assert growth.largest_rows(0) == 0


def test_fused_keeps_less_than_plain_and_checkpointing_less_than_either() -> None:
    planner = Planner(llama_model("SmolLM2"), LoraConfig())
    kept = {
        (path, checkpointing): planner.plan(Setting("lora", StepShape(2, 128, path, checkpointing))).parts["activations"]  # type: ignore[arg-type]
        for path in ("fused", "plain")
        for checkpointing in (False, True)
    }
    assert kept["fused", True] < kept["fused", False] < kept["plain", False]  # type: ignore[operator]
    assert kept["plain", True] < kept["fused", False]  # type: ignore[operator]


def test_no_length_is_longer_than_the_models_context() -> None:
    growth = Growth(2, 256, 10**9, 10**6, 10**4, max_length=2048)
    assert growth.largest_length(10**9 + 10**6) == 356
    assert growth.largest_length(10**12) == 2048


@pytest.mark.parametrize("path", ["plain", "peft"])
def test_sums_of_expert_stacks_are_held_and_their_pairs_counted(path: str) -> None:
    """Each layer forms a stack (8, 48, 64) and one (8, 64, 24) in the weights' dtype, by hand, which stay until the way back; the
    rest of what such a small step keeps is less than half of that."""
    layers, experts, hidden, wide = 3, 8, 64, 24
    model = meta_model(mixture(layers, experts, hidden, wide), torch.float32)
    stacks = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    setting = Setting("lora", StepShape(1, 16, path))  # type: ignore[arg-type]
    found = Planner(model, stacks).plan(setting)
    formed = 4 * layers * experts * (2 * wide * hidden + hidden * wide)
    pairs = layers * experts * 2 * ((hidden + 2 * wide) + (wide + hidden))
    assert found.num_trained == pairs
    assert found.gradient_bytes == 4 * pairs
    assert found.trace is not None
    assert found.trace.gradient_bytes == 4 * pairs
    few = found.trace.kept_bytes - formed
    assert 0 < few < formed / 2


def test_counts_come_without_a_trace_and_say_why() -> None:
    """The same mixture of experts by transformers' plain loop over experts, which asks which rows went where."""
    model = meta_model(mixture(2, 4, 64, 24), torch.float32)
    config, setting = LoraConfig(r=2), Setting("lora", StepShape(1, 16, "plain"))
    known = Planner(model, config).plan(setting)
    model.set_experts_implementation("eager")
    planner = Planner(model, config)
    found = planner.plan(setting)
    assert known.trace is not None
    assert found.trace is None
    assert "without its numbers" in found.untraced
    of_step = {"activations", "logits and loss", "allocator's holes", "working space"}
    assert {part for part, count in found.parts.items() if count is None} == of_step
    assert {phase for phase, count in found.phases.items() if count is None} == {"forward", "backward"}
    for part in found.parts.keys() - of_step:
        assert found.parts[part] == known.parts[part]
    assert known.gradient_bytes == known.trace.gradient_bytes
    assert found.peak_bytes < known.peak_bytes
    assert planner.growth(setting) is None


def mixture(layers: int, experts: int, hidden: int, wide: int) -> Qwen3MoeConfig:
    sizes = {"num_hidden_layers": layers, "num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": wide}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "num_experts_per_tok": 2}
    return Qwen3MoeConfig(**sizes, **heads, intermediate_size=32)


def test_moments_of_eight_bits_take_a_quarter() -> None:
    planner = Planner(llama_model("SmolLM2"), LoraConfig())
    wide, narrow = (planner.plan(Setting("lora", StepShape(1, 32), moment_bytes=each)) for each in (None, 1))
    assert wide.moment_bytes == 4 * narrow.moment_bytes == 8 * 2_442_240


def test_frozen_A_is_no_setting_of_full_fine_tuning() -> None:
    with pytest.raises(ConfigError, match="LoRA-FA"):
        Planner(llama_model("SmolLM2"), LoraConfig()).plan(Setting("full", StepShape(1, 32), freeze_A=True))
