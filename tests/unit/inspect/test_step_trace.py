"""What a trace says is kept is what autograd keeps of the real model on the CPU, byte for byte, and what the formula says.

The oracle is `saved_tensors_hooks` on models with numbers; for Llama also the formula of the research notes, by hand.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from luthier.adapt import attach, plan
from luthier.core.config import LoraConfig
from luthier.inspect import StepShape
from luthier.inspect.step_trace import kept_blocks, trace_whole
from luthier.models import meta_model

ROWS, LENGTH = 3, 40


def families() -> dict[str, Any]:
    from transformers import GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, Phi3Config, Qwen2Config, Qwen3Config

    common = {
        "hidden_size": 64,
        "intermediate_size": 155,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "head_dim": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    less = {key: value for key, value in common.items() if key not in ("num_key_value_heads", "head_dim")}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return {
        "llama": LlamaConfig(**common),
        "qwen2": Qwen2Config(**common),
        "qwen3": Qwen3Config(**common),
        "gemma": GemmaConfig(**common),
        "phi3": Phi3Config(**common),
        "gpt_neox": GPTNeoXConfig(**less, hidden_dropout=0.0, attention_dropout=0.0),
        "opt": OPTConfig(
            hidden_size=64,
            ffn_dim=155,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=211,
            dropout=0.0,
            word_embed_proj_dim=64,
        ),
        "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=211, n_positions=64, **silent),
    }


def mixtures() -> dict[str, Any]:
    """Mixtures of experts. Their sizes are multiples of 8, which torch's grouped products ask for."""
    from transformers import GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

    common = {
        "hidden_size": 64,
        "intermediate_size": 152,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 211,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {
        "mixtral": MixtralConfig(**common, num_local_experts=5),
        "olmoe": OlmoeConfig(**common, num_experts=5),
        "qwen3_moe": Qwen3MoeConfig(**common, num_experts=5, moe_intermediate_size=40, head_dim=16),
        "gpt_oss": GptOssConfig(**common, num_local_experts=5, head_dim=16),
    }


STACKS = LoraConfig(r=3, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
WITH_LAYER_NORM = {"gpt_neox": 2, "opt": 1, "gpt2": 1}
"""Family -> how many of its norms read the embeddings, of which LoRA wants no gradient."""


def num_norms(model: nn.Module, family: str, lora: LoraConfig | None) -> int:
    """Return how many norms of the model keep something."""
    return sum(isinstance(each, nn.LayerNorm) for each in model.modules()) - (WITH_LAYER_NORM[family] if lora else 0)


def really_kept(model: nn.Module) -> int:
    """Return the bytes that autograd keeps when the decoder of a real model runs."""
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with kept_blocks([*model.parameters(), *model.buffers()]) as found:
        output = model.get_decoder()(input_ids=ids, use_cache=False)  # type: ignore[operator]
    del output
    return sum(found.values())


def traced_kept(config: Any, lora: LoraConfig | None, dtype: torch.dtype) -> int:
    model = meta_model(config, dtype)
    shape = StepShape(ROWS, LENGTH, "plain")
    return trace_whole(model, lora and plan(model, lora), shape).saved_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LoraConfig(r=5), None], ids=["lora", "full"])
@pytest.mark.parametrize("family", families())
def test_kept_bytes_are_what_autograd_keeps(family: str, lora: LoraConfig | None, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    config = families()[family]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    if lora is not None:
        attach(model, lora)
    traced, kept = traced_kept(config, lora, dtype), really_kept(model)
    if dtype == torch.bfloat16 and family in WITH_LAYER_NORM:
        # torch's LayerNorm keeps its two numbers a token in 16 bits on the CPU, in float32 elsewhere, as traced.
        traced -= 2 * 2 * ROWS * LENGTH * num_norms(model, family, lora)
    assert traced == kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LoraConfig(r=5), STACKS, None], ids=["lora", "stacks", "full"])
@pytest.mark.parametrize("family", mixtures())
def test_kept_bytes_of_mixtures_are_what_autograd_keeps_wherever_rows_go(
    family: str, lora: LoraConfig | None, dtype: torch.dtype
) -> None:
    from transformers import AutoModelForCausalLM

    config = mixtures()[family]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    if lora is not None:
        attach(model, lora)
    assert traced_kept(config, lora, dtype) == really_kept(model)


def test_another_threads_attention_is_not_touched_while_a_step_is_traced() -> None:
    """Two threads that trace and one that computes: figures as alone, and the function is torch's afterwards."""
    own = F.scaled_dot_product_attention
    config = families()["llama"]
    alone = traced_kept(config, None, torch.float32)
    q = torch.randn(1, 2, 7, 8)
    expected = own(q, q, q)
    with ThreadPoolExecutor(3) as pool:
        traces = [pool.submit(traced_kept, config, None, torch.float32) for _ in range(2)]
        outputs = []
        while not all(trace.done() for trace in traces):
            outputs.append(F.scaled_dot_product_attention(q, q, q))
        assert [trace.result() for trace in traces] == [alone, alone]
    assert outputs
    assert all(torch.equal(output, expected) for output in outputs)
    assert F.scaled_dot_product_attention is own
