"""The adapters that are written and read by both libraries: which tiny model, which configuration.

A configuration is one dictionary; its keys mean the same in luthier's LoraConfig and in PEFT's.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

MakeModel = Callable[[str], nn.Module]
VOCAB = 211
IDS = torch.tensor([[5, 17, 200, 3, 42, 42, 9], [1, 0, 77, 121, 6, 13, 210]])


class Plain(nn.Module):
    """A model of no library: a table, two linear layers (one without bias) and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 13)
        self.first = nn.Linear(13, 31)
        self.norm = nn.LayerNorm(31)
        self.second = nn.Linear(31, 7, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(self.table(ids)))))


class Convolutions(nn.Module):
    """A model of no library: convolutions over one, two and three axes, and one with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, 12)
        self.line = nn.Conv1d(12, 10, 3, padding=1)
        self.plane = nn.Conv2d(5, 6, (2, 3), stride=(1, 2), padding=(1, 0))
        self.grouped = nn.Conv2d(6, 4, (1, 3), groups=2)
        self.volume = nn.Conv3d(2, 7, (2, 2, 1), bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        lines = torch.tanh(self.line(self.table(ids).transpose(1, 2)))
        planes = torch.tanh(self.grouped(torch.tanh(self.plane(lines.unflatten(1, (5, 2))))))
        return self.volume(planes.unflatten(1, (2, 2))).flatten(1)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Return the model's output for `ids` without gradients, whatever kind of model it is."""
    with torch.no_grad():
        output = model(ids)
    return output.logits if hasattr(output, "logits") else output


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest expected value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Move every trainable number a little, as training would: no pair is zero, no copied module equals its base."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # PEFT leaves the replaced original of a saved module trainable under bias='all', though nothing uses it.
            if parameter.requires_grad and "original_module" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


@dataclass(frozen=True)
class Case:
    """One adapter. `tie` marks those that PEFT warns about, whoever wrote them, since the base ties its embeddings."""

    name: str
    model: str
    config: dict[str, Any] = field(default_factory=dict)
    tie: bool = False


QV = ["q_proj", "v_proj"]
CASES = [
    Case("linear", "llama", {"r": 4, "lora_alpha": 16, "target_modules": QV}),
    Case("rank-one", "llama", {"r": 1, "lora_alpha": 3, "target_modules": ["down_proj"]}),
    Case("rslora-float-alpha", "llama", {"r": 7, "lora_alpha": 11.5, "use_rslora": True, "target_modules": QV}),
    Case("all-linear", "llama", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    Case("all-linear-conv1d", "gpt2", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    Case("regex", "llama", {"r": 2, "target_modules": r".*layers\.1\..*\.(q|up)_proj"}),
    Case("full-paths", "llama", {"r": 2, "target_modules": ["model.layers.0.self_attn.k_proj", "mlp.gate_proj"]}),
    Case("exclude-names", "llama", {"r": 2, "target_modules": QV, "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    Case("exclude-regex", "llama", {"r": 2, "target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    Case("layer-one", "llama", {"r": 2, "target_modules": QV, "layers_to_transform": 1}),
    Case("layers-pattern", "llama", {"r": 2, "target_modules": QV, "layers_to_transform": [0], "layers_pattern": "layers"}),
    Case(
        "overlapping-patterns",
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*QV, "up_proj"],
            "rank_pattern": {r".*\.mlp\..*": 3, "layers.1.self_attn.q_proj": 2, "q_proj": 5},
            "alpha_pattern": {"layers.0.self_attn.(q|v)_proj": 32, "q_proj": 1.5},
        },
    ),
    Case(
        "pattern-of-alternatives",
        "llama",
        {"r": 2, "target_modules": QV, "rank_pattern": {"layers.1.self_attn.q_proj|v_proj": 5}},
    ),
    Case("saved-head", "llama", {"r": 2, "target_modules": QV, "modules_to_save": ["lm_head"]}),
    Case("saved-norm-and-head", "llama", {"r": 2, "target_modules": QV, "modules_to_save": ["model.norm", "lm_head"]}),
    Case("saved-block", "llama-bias", {"r": 2, "target_modules": "all-linear", "modules_to_save": ["layers.1.mlp"]}),
    Case("bias-all", "llama-bias", {"r": 2, "target_modules": QV, "bias": "all"}),
    Case("bias-lora-only", "llama-bias", {"r": 2, "target_modules": QV, "bias": "lora_only"}),
    Case("bias-all-conv1d", "gpt2", {"r": 2, "target_modules": ["c_attn"], "bias": "all"}),
    Case("bias-lora-only-conv1d", "gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "bias": "lora_only"}),
    Case("conv1d", "gpt2", {"r": 5, "lora_alpha": 9, "target_modules": ["c_attn", "c_proj"]}),
    Case("gaussian", "llama", {"r": 6, "target_modules": QV, "init_lora_weights": "gaussian"}),
    Case("random", "llama", {"r": 6, "target_modules": QV, "init_lora_weights": False}),
    Case("embedding", "llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]}),
    Case("embedding-by-regex", "llama", {"r": 4, "target_modules": r".*(embed_tokens|k_proj)"}),
    Case("embedding-gpt2", "gpt2", {"r": 3, "target_modules": ["wte", "wpe"]}),
    Case("head", "llama", {"r": 3, "target_modules": ["lm_head"]}),
    Case("tied-linear", "llama-tied", {"r": 3, "target_modules": QV}),
    Case("tied-embedding", "llama-tied", {"r": 3, "target_modules": ["embed_tokens"]}, tie=True),
    Case("tied-head", "llama-tied", {"r": 3, "target_modules": ["lm_head"]}, tie=True),
    Case(
        "tied-saved-together",
        "llama-tied",
        {"r": 3, "target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    Case(
        "tied-saved-by-one-name",
        "llama-tied",
        {"r": 3, "target_modules": QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    Case("plain", "plain", {"r": 3, "lora_alpha": 7, "target_modules": ["table", "first", "second"]}),
    Case("plain-bias", "plain", {"r": 3, "target_modules": ["second"], "bias": "all", "modules_to_save": ["norm"]}),
    Case("convolution-1d", "convolutions", {"r": 3, "lora_alpha": 7, "target_modules": ["line"]}),
    Case("convolution-2d", "convolutions", {"r": 1, "lora_alpha": 5, "target_modules": ["plane"], "use_rslora": True}),
    Case("convolution-3d", "convolutions", {"r": 5, "target_modules": ["volume"], "init_lora_weights": "gaussian"}),
    Case("convolution-grouped", "convolutions", {"r": 4, "target_modules": ["grouped", "plane"]}),
    Case("convolutions-bias", "convolutions", {"r": 2, "target_modules": ["line", "volume"], "bias": "all"}),
    Case("convolutions-lora-only", "convolutions", {"r": 2, "target_modules": ["line", "plane"], "bias": "lora_only"}),
    Case("lora-bias", "llama-bias", {"r": 4, "lora_alpha": 10, "target_modules": QV, "lora_bias": True}),
    Case("lora-bias-random", "llama-bias", {"r": 3, "target_modules": QV, "lora_bias": True, "init_lora_weights": False}),
    Case("lora-bias-beside-bias", "llama-bias", {"r": 2, "target_modules": QV, "lora_bias": True, "bias": "all"}),
    Case("lora-bias-conv1d", "gpt2", {"r": 2, "lora_alpha": 3, "target_modules": ["c_attn", "c_fc"], "lora_bias": True}),
    Case("lora-bias-convolutions", "convolutions", {"r": 2, "target_modules": ["line", "plane"], "lora_bias": True}),
    Case("tokens", "llama", {"r": 2, "target_modules": QV, "trainable_token_indices": [200, 3, 42]}),
    Case("tokens-by-name", "llama", {"r": 2, "target_modules": QV, "trainable_token_indices": {"embed_tokens": [9, 1, 210]}}),
    Case("tokens-tied", "llama-tied", {"r": 2, "target_modules": QV, "trainable_token_indices": [200, 3, 42]}),
    Case("tokens-gpt2", "gpt2", {"r": 2, "target_modules": ["c_attn"], "trainable_token_indices": {"wte": [5, 17]}}),
    Case("tokens-of-no-library", "plain", {"r": 2, "target_modules": ["first"], "trainable_token_indices": {"table": [5, 121]}}),
    Case("tokens-of-a-head", "llama", {"r": 2, "target_modules": QV, "trainable_token_indices": {"lm_head": [7, 8]}}),
    Case("dropout", "llama", {"r": 2, "target_modules": QV, "lora_dropout": 0.25, "task_type": "CAUSAL_LM"}),
    Case("dora", "llama-bias", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": "all-linear"}),
    Case(
        "dora-rslora",
        "llama",
        {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": QV, "rank_pattern": {"q_proj": 2}},
    ),
    Case("dora-conv1d", "gpt2", {"r": 5, "lora_alpha": 9, "use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    Case("dora-embedding", "llama", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    Case("dora-convolutions", "convolutions", {"r": 3, "use_dora": True, "target_modules": ["line", "plane", "volume"]}),
    Case("dora-random", "llama", {"r": 6, "use_dora": True, "target_modules": QV, "init_lora_weights": False}),
    Case("dora-bias", "llama-bias", {"r": 2, "use_dora": True, "target_modules": QV, "bias": "lora_only"}),
]
IDS_OF_CASES = [case.name for case in CASES]


def adamw_curve(parameters: Iterable[torch.nn.Parameter], losses: Iterable[Callable[[], torch.Tensor]]) -> list[float]:
    """Take one AdamW step on each loss in turn and return the losses."""
    optimiser = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.01)
    curve = []
    for loss_of in losses:
        loss = loss_of()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        curve.append(loss.item())
    return curve
