"""What the engine is compared with: adapters that PEFT writes, and transformers' generate with PEFT's adapter on a fresh copy."""

import copy
import random
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from luthier.engine import Completion, Engine

STOP = 256
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "narrow": {"r": 1, "lora_alpha": 2},
    "wide": {"r": 8, "lora_alpha": 16},
    "two": {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 4, "use_dora": True},
    "ranks": {"r": 2, "lora_alpha": 4, "rank_pattern": {"down_proj": 7}, "alpha_pattern": {"o_proj": 9}},
}
Answer = tuple[tuple[int, ...], list[float]]


def save_peft_adapter(model: nn.Module, folder: Path, seed: int, **config: Any) -> Path:
    """Have PEFT make an adapter for a copy of the model, fill it with random numbers and write it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            copy.deepcopy(model), LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": LINEARS} | config)
        )
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator)
                    # B starts at zero; the others (A, a magnitude, a bias, a whole module) are moved, not replaced.
                    parameter.add_((0.25 if "lora_B" in name else 0.1) * noise)
        wrapped.save_pretrained(folder)
    return folder


def with_adapter(model: nn.Module, folder: Path | None) -> nn.Module:
    """Return a copy of the model that wears the adapter by PEFT, or is just the base."""
    if folder is None:
        return copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def with_dense_updates(model: nn.Module, mix: Sequence[tuple[Path, float, float]], *, transposed: bool = False) -> nn.Module:
    """Return a copy whose weights hold the sum of strength * scaling * B @ A in float64; mix has (folder, scaling, strength).

    `transposed` for weights (in, out), as GPT-2's are.
    """
    model = copy.deepcopy(model).double()
    for folder, scaling, strength in mix:
        tensors = load_file(folder / "adapter_model.safetensors")
        for key in (key for key in tensors if key.endswith("lora_A.weight")):
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
            delta = strength * scaling * B @ A
            layer.weight.data += delta.T if transposed else delta
    return model.float()


@torch.no_grad()
def greedy(model: nn.Module, prompt: Sequence[int], max_new_tokens: int, stops: Sequence[int] = (), **settings: Any) -> Answer:
    """Return the tokens of transformers' generate without the stop token, and their log-probabilities (nats)."""
    ids = torch.tensor([list(prompt)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            **settings,
        )
    tokens = made.sequences[0, ids.shape[1] :].tolist()
    if tokens and tokens[-1] in stops:
        tokens.pop()
    logprobs = [float(logits[0].double().log_softmax(-1)[token]) for logits, token in zip(made.logits, tokens, strict=False)]
    return tuple(tokens), logprobs


class Scene:
    """A base, its adapters in folders as PEFT writes them, and what transformers and PEFT answer."""

    def __init__(self, model, tokenizer, folder: Path):
        self.model, self.tokenizer = model, tokenizer
        self.folders = {
            name: save_peft_adapter(model, folder / name, seed, **config) for seed, (name, config) in enumerate(ADAPTERS.items())
        }
        self._worn = {}

    def engine(self, *names, **settings) -> Engine:
        """An engine with these adapters, or all."""
        adapters = {name: self.folders[name] for name in names or self.folders}
        return Engine(self.model, self.tokenizer, adapters=adapters, **settings)

    def wanted(self, name, prompt, max_new_tokens):
        if name not in self._worn:
            self._worn[name] = with_adapter(self.model, self.folders.get(name))
        return greedy(self._worn[name], prompt, max_new_tokens, [STOP])

    def check(self, answer: Completion, name, prompt, max_new_tokens) -> None:
        tokens, logprobs = self.wanted(name, prompt, max_new_tokens)
        assert answer.token_ids == tokens, name
        if answer.logprobs is not None:
            assert [each.logprob for each in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(256) for _ in range(length)] for length in lengths]


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread does soon."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.005)


def in_threads(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each call in a thread of its own, begun a little apart; return what they gave, in their order."""
    found = [None] * len(calls)

    def run(place):
        time.sleep(0.003 * place)
        found[place] = calls[place]()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
