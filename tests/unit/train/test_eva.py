"""EVA: lora_A spans what a layer's inputs vary in at the answers, by a decomposition of all of them at once in float64."""

import heapq
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.train.test_resume import crashed_run, outcome
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.errors import ConfigError, TargetError
from luthier.data.batches import Batch
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.train.eva import start_from_inputs
from luthier.train.run import resume, train
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


def inputs_at_the_answers(model: nn.Module, given: list[Batch], targets: list[str]) -> dict[str, np.ndarray]:
    """Return path -> what the layer is given at the labelled tokens of all batches, recorded by a hook of our own."""
    seen: dict[str, list[torch.Tensor]] = {}
    for path, module in model.named_modules():
        if path.endswith(tuple(targets)):
            module.register_forward_pre_hook(lambda _, args, path=path: seen.setdefault(path, []).append(args[0].detach()))
    for batch in given:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    masks = [batch.labels != -100 for batch in given]
    return {path: torch.cat([x[mask] for x, mask in zip(xs, masks, strict=True)]).double().numpy() for path, xs in seen.items()}


def sloped(model: nn.Module) -> nn.Module:
    """Let the inputs of a tiny Llama's layers vary in a few directions here and in many there."""
    with torch.no_grad():
        for block, factor in zip(model.model.layers, (0.5, 0.8, 0.9), strict=True):
            block.input_layernorm.weight.mul_(factor ** torch.arange(len(block.input_layernorm.weight)).float())
        model.model.layers[1].post_attention_layernorm.weight.mul_(0.8 ** torch.arange(48).float())
    return model


def test_A_spans_the_principal_directions_of_the_inputs_at_the_answers(tiny_llama: Callable[..., nn.Module]) -> None:
    before = tiny_llama()(batches(1)[0].input_ids).logits
    seen = inputs_at_the_answers(tiny_llama(), batches(5), TARGETS)
    adapted = tiny_llama()
    attach(adapted, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"))
    start_from_inputs(adapted, "default", batches(5))
    items = {(item.path, item.role): item.parameter.detach() for item in adapter_parameters(adapted)}
    assert len(seen) == 8
    for path, rows in seen.items():
        assert len(rows) == sum(int((batch.labels != -100).sum()) for batch in batches(5))
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


MOVING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
SIZES = {"r": 3, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 10}}


def handed_out(seen: dict[str, np.ndarray], ranks: dict[str, int], rho: float) -> dict[str, int]:
    """Return the ranks by another road: one rank at a time to the layer whose next direction has the largest share.

    Layers with the same inputs share the most that one of them may have. All in float64, by numpy.
    """
    same = {path: [other for other in seen if seen[other].tobytes() == seen[path].tobytes()] for path in seen}
    most = {path: max(round(rho * ranks[other]) for other in same[path]) for path in seen}
    shares = {}
    for path, rows in seen.items():
        squares = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
        shares[path] = (squares / squares.sum())[: most[path]]
    got = dict.fromkeys(seen, 0)
    queue = [(-shares[path][0], place, path) for place, path in enumerate(seen)]
    heapq.heapify(queue)
    for _ in range(sum(ranks.values())):
        _, place, path = heapq.heappop(queue)
        got[path] += 1
        if got[path] < len(shares[path]):
            heapq.heappush(queue, (-shares[path][got[path]], place, path))
    return got


@pytest.mark.parametrize("adjusts", [True, False])
def test_ranks_move_to_the_largest_shares_of_variance(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, adjusts: bool
) -> None:
    from peft import PeftModel

    seen = inputs_at_the_answers(sloped(tiny_llama(layers=3)), batches(3), MOVING)
    before = {path: 2 if "v_proj" in path else 3 for path in seen}
    expected = handed_out(seen, before, rho=2.5)
    assert 0 in expected.values(), "the case of a layer that loses its pair is not tested"
    assert len(set(expected.values())) > 3

    model = sloped(tiny_llama(layers=3))
    eva = {"rho": 2.5, "adjust_scaling_factors": adjusts}
    attach(model, LoraConfig(**SIZES, target_modules=MOVING, init_lora_weights="eva", eva_config=eva))
    logits = model(batches(1)[0].input_ids).logits
    planned = start_from_inputs(model, "default", batches(3))
    items = {(item.path, item.role): item.parameter.detach() for item in adapter_parameters(model)}
    found = {path: len(tensor) for (path, role), tensor in items.items() if role == "lora_A"}
    assert found == {path: r for path, r in expected.items() if r} == {layer.path: layer.r for layer in planned.layers}
    assert sum(found.values()) == sum(before.values())
    assert torch.equal(model(batches(1)[0].input_ids).logits, logits)
    for path, r in found.items():
        rows, lora_A = seen[path] - seen[path].mean(0), items[path, "lora_A"].double().numpy()
        np.testing.assert_allclose(lora_A @ lora_A.T, np.eye(r), atol=1e-5)
        share = np.square(rows @ lora_A.T).sum() / np.square(np.linalg.svd(rows, compute_uv=False)[:r]).sum()
        assert share == pytest.approx(1, abs=1e-4)
        alpha = 10 if "o_proj" in path else 6
        wanted = alpha / before[path] if adjusts else alpha / r
        assert model.get_submodule(path).lora["default"].scaling == pytest.approx(wanted, rel=1e-12)

    # The file says it in words that both understand.
    with torch.no_grad():
        for (_, role), tensor in items.items():
            if role == "lora_B":
                tensor.normal_(std=0.1)
    ids = batches(1)[0].input_ids
    save_adapter(model, tmp_path / "saved")
    again = sloped(tiny_llama(layers=3))
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about its own adapters is not what is tested
        theirs = PeftModel.from_pretrained(sloped(tiny_llama(layers=3)), tmp_path / "saved")
    assert {name for name, module in theirs.named_modules() if hasattr(module, "lora_A")} == {
        f"base_model.model.{path}" for path in found
    }
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits, model(ids).logits, atol=1e-2)


def test_peft_moves_the_same_ranks_for_the_same_inputs(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    import peft

    config = {**SIZES, "target_modules": MOVING, "init_lora_weights": "eva"}
    given = [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels} for batch in batches(3)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eva = peft.EvaConfig(rho=2.5)
        theirs = peft.get_peft_model(sloped(tiny_llama(layers=3)), peft.LoraConfig(**config, eva_config=eva))
        peft.initialize_lora_eva_weights(theirs, given, show_progress_bar=False)
    model = sloped(tiny_llama(layers=3))
    attach(model, LoraConfig(**config, eva_config={"rho": 2.5}))
    start_from_inputs(model, "default", batches(3))
    ours = {item.path: item.parameter for item in adapter_parameters(model) if item.role == "lora_A"}
    layers = {
        name.removeprefix("base_model.model."): module for name, module in theirs.named_modules() if hasattr(module, "lora_A")
    }
    assert {path: len(lora_A) for path, lora_A in ours.items()} == {path: module.r["default"] for path, module in layers.items()}
    for path, module in layers.items():
        assert model.get_submodule(path).lora["default"].scaling == pytest.approx(module.scaling["default"])
        turned = torch.linalg.svdvals(module.lora_A["default"].weight @ ours[path].detach().T)  # cosines of the angles between
        assert turned.min() > 0.99, path

    # PEFT's own file of such an adapter, which says eva_config, is read.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["eva_config"]["rho"] == 2.5
    again = sloped(tiny_llama(layers=3))
    load_adapter(again, tmp_path / "theirs")
    assert {item.path for item in adapter_parameters(again)} == set(layers)


def test_a_run_whose_ranks_moved_is_resumed_bit_for_bit(settings_in: Callable[..., RunSettings], tmp_path: Path) -> None:
    lora = {"r": 5, "use_dora": True, "init_lora_weights": "eva", "eva_config": {"rho": 3}}
    ways = {"lora": lora, "train": {"save_every": 1, "batch_rows": 4}}
    whole = train(settings_in(tmp_path / "whole", **ways))
    assert len({layer.r for layer in whole.prepared.plan.layers}) > 1, "no rank moved"
    assert sum(layer.r for layer in whole.prepared.plan.layers) == 5 * 7
    cut = crashed_run(settings_in(tmp_path / "cut", **ways), 3)
    torch.manual_seed(99)
    again = resume(cut)
    assert outcome(cut) == outcome(tmp_path / "whole")
    assert [layer.r for layer in again.prepared.plan.layers] == [layer.r for layer in whole.prepared.plan.layers]


def test_moving_ranks_needs_the_init_that_knows_where_to() -> None:
    with pytest.raises(ConfigError, match="eva_config has an effect only with init_lora_weights = 'eva'"):
        LoraConfig(eva_config={"rho": 2})
    with pytest.raises(ConfigError, match="rho"):
        LoraConfig(init_lora_weights="eva", eva_config={"rho": 0.5})
