"""Models without numbers: real transformers models on the meta device, counted by luthier's plan and by formula."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import nn

from luthier.adapt import plan
from luthier.core.config import LoraConfig

Q_AND_V = ["q_proj", "v_proj"]

LLAMA = {  # hidden, feed-forward, layers, heads, key-value heads, vocabulary, tied
    "7B": (4096, 11008, 32, 32, 32, 32000, False),
    "13B": (5120, 13824, 40, 40, 40, 32000, False),
    "65B": (8192, 22016, 80, 64, 64, 32000, False),
    "2-70B": (8192, 28672, 80, 64, 8, 32000, False),
    "SmolLM2": (576, 1536, 30, 9, 3, 49152, True),
    "3.2-3B": (3072, 8192, 28, 24, 8, 128256, True),
}


@cache
def llama_model(size: str) -> nn.Module:
    """Return a Llama model on the meta device: shapes, no numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, feed_forward, layers, heads, kv_heads, vocab, tied = LLAMA[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def llama_by_formula(size: str) -> int:
    """Return a Llama model's parameters: embedding and head, and per layer four projections, three of the MLP, two norms."""
    hidden, feed_forward, layers, heads, kv_heads, vocab, tied = LLAMA[size]
    narrow = hidden // heads * kv_heads
    layer = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * feed_forward + 2 * hidden
    return vocab * hidden * (1 if tied else 2) + layers * layer + hidden


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def linear(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers but the head."""
    return [(path, one) for path, one in model.named_modules() if isinstance(one, nn.Linear) and path != "lm_head"]


def trained(model: nn.Module, r: int, targets: list[str] | str = Q_AND_V) -> int:
    """Return how many numbers an adapter trains, by luthier's plan."""
    return plan(model, LoraConfig(r=r, target_modules=targets)).num_parameters


def trained_by_hand(shapes: Iterable[tuple[int, int]], r: int) -> int:
    """Return r (in + out), summed."""
    return sum(r * (one + other) for one, other in shapes)
