"""AdaLoRA beside PEFT: the same loss, gradients, masks and merged weights, and folders that travel both ways, ranks of 0 too."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tests.parity.cases import VOCAB, MakeModel, logits, randomise, relative
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.adapt.merging import merge
from luthier.adapt.ranks import RankAllocator, adalora_pairs, drop_masked
from luthier.adapt.state import adapter_parameters
from luthier.core.config import AdaLoraConfig
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.keys import item_key

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "llama-bias": ["k_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
CONFIG: dict[str, Any] = {"init_r": 5, "target_r": 2, "lora_alpha": 10, "total_step": 24, "tinit": 4, "tfinal": 6, "deltaT": 3}
CONFIG["task_type"] = "CAUSAL_LM"  # without one PEFT leaves the penalty out

each_model = pytest.mark.parametrize("name", TARGETS)


def both(make_model: MakeModel, name: str, **changed: Any) -> tuple[nn.Module, dict[str, nn.Parameter], nn.Module, dict]:
    """Return ours and PEFT's model in training mode from one seed, each with its trained tensors by their names on disk."""
    config = CONFIG | {"target_modules": TARGETS[name]} | changed
    ours, theirs = make_model(name), make_model(name)
    torch.manual_seed(11)
    attach(ours, AdaLoraConfig(**config))
    torch.manual_seed(11)
    theirs = peft.get_peft_model(theirs, peft.AdaLoraConfig(**config, fan_in_fan_out=name == "gpt2"))
    trained = {item_key(item): item.parameter for item in adapter_parameters(ours)}
    expected = {key.replace(".default", ""): value for key, value in theirs.named_parameters() if value.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[key], expected[key]) for key in trained)
    return ours.train(), trained, theirs.train(), expected


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return list((torch.randint(0, VOCAB, (count, 3, 1), generator=generator) + torch.arange(19)) % VOCAB)


@each_model
def test_one_step_gives_the_same_loss_penalty_and_gradients(name: str, make_model: MakeModel) -> None:
    ours, trained, theirs, expected = both(make_model, name)
    for parameters in (trained, expected):  # E = 0 would leave A and B without a gradient of the loss
        generator = torch.Generator().manual_seed(1)
        for parameter in parameters.values():
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    ids = batches(1)[0]
    loss = ours(input_ids=ids, labels=ids).loss + RankAllocator(ours).penalty()
    with_penalty = theirs(input_ids=ids, labels=ids).loss
    assert relative(loss.detach(), with_penalty.detach()) <= 1e-5
    for each in (loss, with_penalty):
        each.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
    assert {key: error for key in trained if (error := relative(trained[key].grad, expected[key].grad)) > 1e-4} == {}


@each_model
def test_the_ranks_move_as_in_peft(name: str, make_model: MakeModel) -> None:
    ours, trained, theirs, expected = both(make_model, name)
    ranks = RankAllocator(ours)
    optimizers = [torch.optim.AdamW(each.values(), lr=2e-2, weight_decay=0.01) for each in (trained, expected)]
    allocations = 0
    for step, ids in enumerate(batches(6) * 4, start=1):
        (ours(input_ids=ids, labels=ids).loss + ranks.penalty()).backward()
        theirs(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        before = theirs.peft_config["default"].rank_pattern
        ranks.update(step)
        theirs.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not before:
            allocations += 1
            paths = [path for path, _ in adalora_pairs(ours)]
            ours_pattern = {f"{path}.lora_E.default": mask.tolist() for path, mask in zip(paths, ranks.masks, strict=True)}
            assert ours_pattern == pattern, f"step {step}"
    assert allocations == 5  # 6, 9, 12, 15 and the last, 18
    assert sum(int(mask.sum()) for mask in ranks.masks) == 2 * len(ranks.pairs)
    assert {key: error for key in trained if (error := relative(trained[key].detach(), expected[key].detach())) > 1e-3} == {}


@each_model
def test_the_merged_weight_is_the_dense_float64_one(name: str, make_model: MakeModel) -> None:
    model = make_model(name)
    attach(model, AdaLoraConfig(**CONFIG, target_modules=TARGETS[name]))
    randomise(model)
    before = logits(model)
    dense = make_model(name).double()
    for path, pair in adalora_pairs(model):
        A, B, E = (getattr(pair, role).detach().double() for role in ("lora_A", "lora_B", "lora_E"))
        delta = sum(E[i, 0] * torch.outer(B[:, i], A[i]) for i in range(5)) * (10 / 5.00001)
        dense.get_parameter(f"{path}.weight").data += delta.T if name == "gpt2" else delta
    assert relative(before, logits(dense)) <= 1e-5
    assert relative(before, logits(make_model(name))) > 1e-4
    merge(model)
    assert relative(logits(model), logits(dense)) <= 1e-5
    for path, _ in adalora_pairs(model):
        assert relative(model.get_parameter(f"{path}.weight").detach(), dense.get_parameter(f"{path}.weight").detach()) <= 1e-6


def pruned(model: nn.Module, name: str) -> nn.Module:
    """Attach, randomise and prune: of the first layer nothing is left, of the second all, of others a part."""
    attach(model, AdaLoraConfig(**CONFIG, target_modules=TARGETS[name]))
    randomise(model)
    for index, (_, pair) in enumerate(adalora_pairs(model)):
        mask = torch.tensor([index > 0, index > 0, index == 1, index != 0, index == 1])
        pair.lora_E.data.masked_fill_(~mask.unsqueeze(1), 0.0)
    return model


def peft_loads(make_model: MakeModel, name: str, folder: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing keys are warnings in PEFT
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        # It takes the keys of the masks, which it writes like this itself, for patterns of plain LoRA.
        warnings.filterwarnings("ignore", message="The following rank_pattern keys did not match any targeted module")
        return peft.PeftModel.from_pretrained(make_model(name), folder).eval()


@each_model
@pytest.mark.parametrize("drops", [False, True])
def test_ours_loads_in_peft_and_in_ours(name: str, drops: bool, make_model: MakeModel, tmp_path: Path) -> None:
    model = pruned(make_model(name), name)
    expected = logits(model)
    if drops:
        left = list(drop_masked(model).values())
        assert (left[0], left[1], left[2]) == (0, 5, 3)
    assert relative(logits(model), expected) <= 1e-6
    save_adapter(model, tmp_path / "ours")
    assert relative(expected, logits(make_model(name))) > 1e-4
    assert relative(logits(peft_loads(make_model, name, tmp_path / "ours")), expected) <= 1e-5
    again = make_model(name)
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()


@each_model
def test_peft_trained_loads_in_ours_and_goes_back(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    _, _, theirs, expected = both(make_model, name)
    optimizer = torch.optim.AdamW(expected.values(), lr=5e-2)
    for step, ids in enumerate(batches(6) * 4, start=1):
        theirs(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.eval().save_pretrained(tmp_path / "peft")
    model = make_model(name)
    load_adapter(model, tmp_path / "peft")
    assert relative(logits(model), logits(theirs)) <= 1e-5
    assert relative(logits(make_model(name)), logits(theirs)) > 1e-4
    save_adapter(model, tmp_path / "ours")
    assert relative(logits(peft_loads(make_model, name, tmp_path / "ours")), logits(theirs)) <= 1e-5
    first, second = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("peft", "ours"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    configs = [json.loads((tmp_path / each / "adapter_config.json").read_text()) for each in ("peft", "ours")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]


def test_a_file_with_the_adapters_name_in_its_keys_is_read(make_model: MakeModel, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = pruned(make_model("llama"), "llama")
    drop_masked(model)
    save_adapter(model, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    (tmp_path / "ours" / "luthier.json").unlink()
    save_file({f"{key}.named": tensor for key, tensor in tensors.items()}, tmp_path / "ours" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    config["rank_pattern"] = {f"{key}.named": mask for key, mask in config["rank_pattern"].items()}
    (tmp_path / "ours" / "adapter_config.json").write_text(json.dumps(config))
    again = make_model("llama")
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


def test_without_labels_or_with_them_a_loaded_adapter_is_evaluated_without_the_penalty(
    make_model: MakeModel, tmp_path: Path
) -> None:
    """PEFT adds it to the loss of evaluations, and fails with labels on a loaded adapter."""
    model = pruned(make_model("llama"), "llama")
    drop_masked(model)
    save_adapter(model, tmp_path / "ours")
    again = make_model("llama")
    load_adapter(again, tmp_path / "ours")
    ids = batches(1)[0]
    with torch.no_grad():
        output = again(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].reshape(-1, VOCAB).double(), ids[:, 1:].reshape(-1))
    assert relative(output.loss, expected) <= 1e-6
