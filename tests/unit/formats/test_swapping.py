"""Swapping an adapter of a live model for a folder: what a fresh load gives, bit for bit, and nothing else moves."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from luthier.adapt import activate, adapter_parameters, detach, disabled, fuse, fusion_of, merge, roster_of
from luthier.core.errors import AdapterFormatError, AdapterMismatchError, AdapterStateError, BaseMismatchError, LuthierError
from luthier.formats.adapters import load_adapter, save_adapter, swap_adapter

Make = Callable[..., nn.Module]
Folders = Callable[[str], Path]
IDS = torch.randint(3, 211, (2, 9), generator=torch.Generator().manual_seed(5))
OTHERS: dict[str, dict[str, Any]] = {
    "same-shape": {},
    "other-rank-and-alpha": {"r": 5, "lora_alpha": 31, "use_rslora": True},
    "fewer-layers": {"r": 2, "target_modules": ["layers.1.self_attn.q_proj"]},
    "other-layers": {"target_modules": ["k_proj", "up_proj"], "rank_pattern": {"k_proj": 4}},
    "with-a-table": {"target_modules": ["embed_tokens", "q_proj"]},
    "with-saved-modules": {"modules_to_save": ["model.norm", "lm_head"]},
    "with-trained-rows": {"trainable_token_indices": [5, 17, 200], "lora_bias": True},
    "saved-where-it-was-adapted": {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]},
}


def numbers(model: nn.Module, name: str) -> dict[tuple[str, str, str], Tensor]:
    return {(item.path, item.role, item.key): item.parameter for item in adapter_parameters(model, name)}


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folders(adapted: Make, tmp_path: Path) -> Folders:
    """Return a function that writes the folder of one of OTHERS, each for `tiny_llama()`."""

    def folder_of(key: str) -> Path:
        folder = tmp_path / key
        return folder if folder.exists() else save_adapter(adapted(seed=20 + list(OTHERS).index(key), **OTHERS[key]), folder)

    return folder_of


@pytest.mark.parametrize("old", ["same-shape", "with-saved-modules", "saved-where-it-was-adapted", "with-a-table"])
@pytest.mark.parametrize("new", OTHERS)
def test_a_swap_equals_a_fresh_load_bit_for_bit(tiny_llama: Make, folders: Folders, old: str, new: str) -> None:
    fresh, model = tiny_llama(), tiny_llama()
    load_adapter(fresh, folders(new))
    load_adapter(model, folders(old))
    before = output(model)
    report = swap_adapter(model, folders(new))
    assert torch.equal(output(model), output(fresh))
    assert old == new or not torch.equal(output(model), before)
    assert {str(key) for key in numbers(model, "default")} == {str(key) for key in numbers(fresh, "default")}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert roster_of(model).configs["default"] == report.plan.config == roster_of(fresh).configs["default"]
    detach(model)
    base = tiny_llama()
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert torch.equal(output(model), output(base))


@pytest.mark.parametrize("new", ["other-rank-and-alpha", "fewer-layers", "other-layers"])
def test_other_adapters_and_what_is_active_stay(tiny_llama: Make, adapted: Make, folders: Folders, new: str) -> None:
    model = adapted(name="sql", seed=1)
    for name, seed in [("sql-v2", 2), ("v2", 3)]:
        adapted(model, name=name, seed=seed, target_modules=["q_proj", "v_proj"])
    activate(model, {"sql-v2": 0.5, "sql": -1.5})
    kept = {name: numbers(model, name) for name in ("sql-v2", "v2")}
    values = {name: {key: tensor.detach().clone() for key, tensor in each.items()} for name, each in kept.items()}
    swap_adapter(model, folders(new), "sql")
    for name, each in kept.items():
        now = numbers(model, name)
        assert list(now) == list(each) and all(now[key] is each[key] for key in each)
        assert all(torch.equal(now[key], values[name][key]) and now[key].requires_grad for key in each)
    assert roster_of(model).active == {"sql-v2": 0.5, "sql": -1.5}
    assert list(roster_of(model).configs) == ["sql", "sql-v2", "v2"]
    fresh = tiny_llama()
    load_adapter(fresh, folders(new), "sql")
    activate(model, "sql")
    assert torch.equal(output(model), output(fresh))
    with disabled(model):
        assert torch.equal(output(model), output(tiny_llama()))


def truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def lose_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "luthier.json").unlink()


def lose_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "kind"), [(truncate, AdapterFormatError), (lose_a_tensor, AdapterMismatchError), (lose_all, LuthierError)]
)
def test_a_bad_folder_leaves_the_model_as_it_was(
    adapted: Make, folders: Folders, spoil: Callable[[Path], None], kind: type[LuthierError]
) -> None:
    model = adapted()
    folder = folders("other-layers")
    spoil(folder)
    refused(model, folder, "default", kind)


def test_an_adapter_of_another_base_is_refused(adapted: Make, tiny_llama: Make, tmp_path: Path) -> None:
    folder = save_adapter(adapted(tiny_llama(seed=4)), tmp_path / "foreign")
    refused(adapted(), folder, "default", BaseMismatchError)


def test_states_that_refuse_a_swap(adapted: Make, folders: Folders) -> None:
    model = adapted(name="sql")
    refused(model, folders("same-shape"), "sqll", AdapterStateError)
    merge(model)
    refused(model, folders("same-shape"), "sql", AdapterStateError)
    model = adapted(adapted(name="sql"), name="tone")
    activate(model, ["sql", "tone"])
    refused(model, folders("with-saved-modules"), "sql", AdapterStateError)
    activate(model, {"sql": 0.5})
    refused(model, folders("with-saved-modules"), "sql", AdapterStateError)


def refused(model: nn.Module, folder: Path, name: str, kind: type[LuthierError]) -> None:
    """Swap, expect this error, and check that not one object of the model was exchanged or written."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    values, classes = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    roster = copy.copy(vars(roster_of(model)))
    configs, active = dict(roster["configs"]), dict(roster["active"])
    with pytest.raises(kind):
        swap_adapter(model, folder, name)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters) and all(now[key] is parameters[key] for key in now)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == classes
    assert (roster_of(model).configs, roster_of(model).active) == (configs, active)


def test_a_swapped_adapter_is_saved_as_what_it_is_now(adapted: Make, folders: Folders, tmp_path: Path) -> None:
    model = adapted(name="sql")
    swap_adapter(model, folders("other-rank-and-alpha"), "sql")
    again = save_adapter(model, tmp_path / "again", "sql")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / file).read_bytes() == (folders("other-rank-and-alpha") / file).read_bytes()


def test_a_swapped_adapter_can_be_trained_on(adapted: Make, folders: Folders) -> None:
    model = adapted()
    swap_adapter(model, folders("other-layers"), trainable=True)
    model(IDS).logits.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in numbers(model, "default").values())


def test_fused_blocks_take_a_swapped_adapter_and_come_apart_for_one_that_replaces_modules(
    tiny_llama: Make, adapted: Make, folders: Folders
) -> None:
    model, fresh = adapted(), tiny_llama()
    fuse(model)
    assert fusion_of(model)
    swap_adapter(model, folders("other-layers"))
    load_adapter(fresh, folders("other-layers"))
    torch.testing.assert_close(output(model), output(fresh), rtol=1e-4, atol=1e-5)
    swap_adapter(model, folders("saved-where-it-was-adapted"))
    swap_adapter(fresh, folders("saved-where-it-was-adapted"))
    assert torch.equal(output(model), output(fresh))


def test_a_compiled_model_is_not_compiled_again_where_ranks_are_equal(adapted: Make, folders: Folders) -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(lambda ids: model(ids, use_cache=False).logits, backend=counting)
    with torch.no_grad():
        before = run(IDS)
        count = len(graphs)
        assert count > 0
        swap_adapter(model, folders("same-shape"))
        after = run(IDS)
        assert len(graphs) == count
        torch.testing.assert_close(after, model(IDS).logits, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after, before)
        swap_adapter(model, folders("other-rank-and-alpha"))
        torch.testing.assert_close(run(IDS), model(IDS).logits, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
