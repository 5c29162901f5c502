"""EVA: lora_A spans what a layer's inputs vary in at the answers, by a decomposition of all of them at once in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, TargetError
from luthier.data.batches import Batch
from luthier.train.eva import start_from_inputs
from luthier.train.run import train
from luthier.train.settings import RunSettings

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


def batches(count: int, rows: int = 6, tokens: int = 21) -> list[Batch]:
    """Return padded batches with labels on the last two thirds of each row."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 211, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -5:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, : tokens // 3] = -100
        found.append(Batch(ids, mask, labels))
    return found


def test_A_spans_the_principal_directions_of_the_inputs_at_the_answers(tiny_llama: Callable[..., nn.Module]) -> None:
    model, seen = tiny_llama(), {}
    before = tiny_llama()(batches(1)[0].input_ids).logits
    for path, module in model.named_modules():
        if path.endswith(tuple(TARGETS)):
            module.register_forward_pre_hook(lambda _, given, path=path: seen.setdefault(path, []).append(given[0].detach()))
    for batch in batches(5):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    masks = [batch.labels != -100 for batch in batches(5)]

    adapted = tiny_llama()
    attach(adapted, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"))
    start_from_inputs(adapted, "default", batches(5))
    items = {(item.path, item.role): item.parameter.detach() for item in adapter_parameters(adapted)}
    assert len(seen) == 8
    for path, inputs in seen.items():
        rows = torch.cat([x[mask] for x, mask in zip(inputs, masks, strict=True)]).double().numpy()
        assert len(rows) == sum(int(mask.sum()) for mask in masks)
        sizes = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        lora_A = items[path, "lora_A"].double().numpy()
        np.testing.assert_allclose(lora_A @ lora_A.T, np.eye(4), atol=1e-5)
        # A random model's inputs vary in all directions nearly alike, so the share of variance is compared, not the angle.
        share = np.square((rows - rows.mean(0)) @ lora_A.T).sum() / np.square(sizes[:4]).sum()
        assert 0.95 <= share <= 1 + 1e-6, path
        assert not items[path, "lora_B"].any()
    assert torch.equal(adapted(batches(1)[0].input_ids).logits, before)
    assert all(item.parameter.requires_grad for item in adapter_parameters(adapted))


def test_too_few_answers_are_told_and_nothing_is_set(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    attach(model, LoraConfig(r=14, target_modules=["q_proj", "down_proj"], init_lora_weights="eva"))
    before = [item.parameter.clone() for item in adapter_parameters(model)]
    with pytest.raises(ConfigError, match=r"too few for 4 of 4 layers"):
        start_from_inputs(model, "default", batches(1, rows=1, tokens=21))
    assert all(torch.equal(item.parameter, old) for item, old in zip(adapter_parameters(model), before, strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_embeddings_have_no_inputs_to_look_at(tiny_llama: Callable[..., nn.Module]) -> None:
    with pytest.raises(TargetError, match="init 'eva' is for linear layers"):
        attach(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights="eva"))


def test_a_run_begins_so_and_says_true_in_its_file(run_settings: Callable[..., RunSettings]) -> None:
    settings = run_settings(lora={"r": 3, "init_lora_weights": "eva"}, train={"freeze_A": True})
    outcome = train(settings)
    for item in adapter_parameters(outcome.prepared.base.model):
        if item.role == "lora_A":
            assert torch.allclose(item.parameter @ item.parameter.T, torch.eye(3), atol=1e-5)
    assert '"init_lora_weights": true' in (Path(settings.out) / "adapter/adapter_config.json").read_text()
