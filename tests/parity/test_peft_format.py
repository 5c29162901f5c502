"""Adapter folders travel: ours loads in PEFT, PEFT's loads in ours, with the same logits, tensors and configuration."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.parity.cases import CASES, IDS_OF_CASES, Case, MakeModel, logits, randomise, relative
from torch import nn

from luthier.adapt.attaching import attach
from luthier.core.config import LoraConfig
from luthier.formats.adapters import load_adapter, save_adapter, swap_adapter

# transformers deprecated a property that PEFT 0.21 still asks for.
PEFT_IS_BEHIND = r"`is_gradient_checkpointing` is deprecated"
pytestmark = pytest.mark.filterwarnings(f"ignore:{PEFT_IS_BEHIND}:FutureWarning")
each_case = pytest.mark.parametrize("case", CASES, ids=IDS_OF_CASES)
Written = Callable[..., tuple[nn.Module, Path]]


def ours_written(make_model: MakeModel, case: Case, folder: Path, **saving: Any) -> nn.Module:
    """Make, randomise and save an adapter with luthier, and return the live model."""
    live = make_model(case.model)
    attach(live, LoraConfig(**case.config))
    randomise(live)
    save_adapter(live, folder, **saving)
    return live


def sorted_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json with the lists sorted that PEFT writes in the order of a set."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(config[key])
    return config


def same_tensors(one: Path, other: Path, *, but: tuple[str, ...] = ()) -> bool:
    """Compare two files bit for bit: names, dtypes, shapes and values."""
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    a = {key: tensor for key, tensor in a.items() if not key.endswith(but)} if but else a
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# What PEFT writes beside the adapter: the base's own, unchanged tables, and copies of a bias that modules_to_save holds.
EXTRAS = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight", "modules_to_save.bias", "original_module.bias")


@each_case
def test_ours_loads_in_peft_without_a_word(case: Case, make_model: MakeModel, tmp_path: Path) -> None:
    live = ours_written(make_model, case, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=PEFT_IS_BEHIND)
        # It cannot merge these, whoever wrote them.
        warnings.filterwarnings("ignore", message="LoRA adapter added to ConvNd layer with groups > 1")
        if case.tie:
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        model = PeftModel.from_pretrained(make_model(case.model), tmp_path / "ours").eval()
        result = model.load_adapter(tmp_path / "ours", "default")
    assert not result.missing_keys and not result.unexpected_keys
    assert relative(logits(model), logits(live)) <= 1e-5
    assert relative(logits(make_model(case.model)), logits(live)) > 1e-3, "the adapter does nothing: nothing was compared"


@each_case
def test_peft_written_loads_in_ours(case: Case, make_model: MakeModel, peft_written: Written) -> None:
    live, folder = peft_written(case.model, case.config)
    model = make_model(case.model)
    load_adapter(model, folder)
    assert relative(logits(model), logits(live)) <= 1e-5
    assert relative(logits(make_model(case.model)), logits(live)) > 1e-3, "the adapter does nothing: nothing was compared"


@each_case
def test_from_peft_to_ours_and_back_is_bit_equal(
    case: Case, make_model: MakeModel, peft_written: Written, tmp_path: Path
) -> None:
    live, first = peft_written(case.model, case.config)
    model = make_model(case.model)
    load_adapter(model, first)
    save_adapter(model, tmp_path / "ours")
    assert same_tensors(first, tmp_path / "ours", but=EXTRAS)
    assert sorted_config(first) == sorted_config(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = PeftModel.from_pretrained(make_model(case.model), tmp_path / "ours").eval()
        again.save_pretrained(tmp_path / "again")
    assert same_tensors(first, tmp_path / "again")
    assert sorted_config(first) == sorted_config(tmp_path / "again")
    assert torch.equal(logits(again), logits(live))


@each_case
def test_from_ours_to_peft_and_back_is_bit_equal(case: Case, make_model: MakeModel, tmp_path: Path) -> None:
    ours_written(make_model, case, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        middle = PeftModel.from_pretrained(make_model(case.model), tmp_path / "ours")
        middle.save_pretrained(tmp_path / "middle")
    model = make_model(case.model)
    load_adapter(model, tmp_path / "middle")
    save_adapter(model, tmp_path / "again")
    assert same_tensors(tmp_path / "ours", tmp_path / "again")
    assert sorted_config(tmp_path / "ours") == sorted_config(tmp_path / "again")


def test_patterns_keep_their_order_in_the_file(make_model: MakeModel, tmp_path: Path) -> None:
    """The first match decides, and this order is not the alphabet's. (PEFT sorts the keys when it saves, and then cannot
    load what it wrote; so this order is tested in one direction only.)"""
    case = Case("", "llama", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 5, "layers.1.self_attn.q_proj": 2}})
    live = ours_written(make_model, case, tmp_path / "ours")
    model = PeftModel.from_pretrained(make_model("llama"), tmp_path / "ours").eval()
    assert list(json.loads((tmp_path / "ours/adapter_config.json").read_text())["rank_pattern"]) == list(
        case.config["rank_pattern"]
    )
    assert relative(logits(model), logits(live)) <= 1e-5


def test_a_table_saved_with_the_adapter_is_what_peft_writes(make_model: MakeModel, peft_written: Written, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "embedding")
    _, first = peft_written(case.model, case.config)
    model = make_model(case.model)
    load_adapter(model, first)
    save_adapter(model, tmp_path / "ours", save_embedding_layers=True)
    assert same_tensors(first, tmp_path / "ours")


def test_base_tables_that_peft_was_asked_to_save_are_left_out(make_model: MakeModel, peft_written: Written) -> None:
    live, folder = peft_written("llama", {"r": 2, "target_modules": ["q_proj"]}, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(folder / "adapter_model.safetensors")
    model = make_model("llama")
    load_adapter(model, folder)
    assert relative(logits(model), logits(live)) <= 1e-5


def test_a_resized_table_in_the_file_is_named(make_model: MakeModel, peft_written: Written, tiny_llama: Any) -> None:
    from luthier.core.errors import AdapterMismatchError

    _, folder = peft_written("llama", {"r": 2, "target_modules": ["q_proj"]}, save_embedding_layers=True)
    with pytest.raises(AdapterMismatchError, match=r"embed_tokens\.weight .*not expected"):
        load_adapter(tiny_llama(seed=9), folder)


def test_other_names_and_their_folders(make_model: MakeModel, tmp_path: Path) -> None:
    """PEFT puts `default` into the folder itself and every other adapter below it; each is read by naming its folder."""
    import peft

    from luthier.core.errors import AdapterFormatError

    live = peft.get_peft_model(make_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="legal")
    live.add_adapter("medical", peft.LoraConfig(r=3, target_modules=["v_proj", "o_proj"]))
    for name in ("legal", "medical"):
        live.set_adapter(name)
        randomise(live, seed=len(name))
    live.eval().save_pretrained(tmp_path / "both")
    model = make_model("llama")
    load_adapter(model, tmp_path / "both" / "medical", "medical")
    assert relative(logits(model), logits(live)) <= 1e-5
    load_adapter(model, tmp_path / "both" / "legal", "other-name")
    live.set_adapter("legal")
    from luthier.adapt.switching import activate

    activate(model, "other-name")
    assert relative(logits(model), logits(live)) <= 1e-5
    with pytest.raises(AdapterFormatError, match="legal, medical"):
        load_adapter(model, tmp_path / "both", "third")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_files(dtype: torch.dtype, make_model: MakeModel, peft_written: Written, tmp_path: Path) -> None:
    """The file's numbers become float32 masters, as in PEFT: nothing is rounded, and both compute the same."""
    from safetensors.torch import save_file

    _, folder = peft_written("llama", {"r": 4, "target_modules": ["q_proj", "down_proj"]})
    halves = {key: tensor.to(dtype) for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    save_file(halves, folder / "adapter_model.safetensors", {"format": "pt"})
    model = make_model("llama")
    load_adapter(model, folder)
    theirs = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    assert relative(logits(model), logits(theirs)) <= 1e-5
    save_adapter(model, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert written.keys() == halves.keys()
    assert all(written[key].dtype == torch.float32 and torch.equal(written[key].to(dtype), halves[key]) for key in halves)


def test_the_adapter_of_a_bf16_base_is_float32_in_both(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama").to(torch.bfloat16)
    attach(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(model)
    save_adapter(model, tmp_path / "ours")
    theirs = PeftModel.from_pretrained(make_model("llama").to(torch.bfloat16), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert {tensor.dtype for key, tensor in ours.items() if "lora" in key} == {torch.float32}
    assert all(torch.equal(ours[key], again[key]) for key in ours if "lora" in key)


def test_pickles_are_read_on_request_only(make_model: MakeModel, peft_written: Written) -> None:
    from luthier.core.errors import AdapterFormatError

    live, folder = peft_written("llama", {"r": 2, "target_modules": ["q_proj"]}, safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file() and not (folder / "adapter_model.safetensors").exists()
    model = make_model("llama")
    with pytest.raises(AdapterFormatError, match="allow_pickle=True"):
        load_adapter(model, folder)
    load_adapter(model, folder, allow_pickle=True)
    assert relative(logits(model), logits(live)) <= 1e-5


def test_keys_that_still_hold_the_adapters_name(make_model: MakeModel, peft_written: Written) -> None:
    from safetensors.torch import save_file

    live, folder = peft_written("plain", {"r": 2, "target_modules": ["table", "first"]})
    tensors = load_file(folder / "adapter_model.safetensors")
    named = {
        key.replace(".weight", ".default.weight") if key.endswith(".weight") else f"{key}.default": tensor
        for key, tensor in tensors.items()
    }
    assert named.keys().isdisjoint(tensors)
    save_file(named, folder / "adapter_model.safetensors")
    model = make_model("plain")
    load_adapter(model, folder)
    assert relative(logits(model), logits(live)) <= 1e-5


def test_the_smallest_config_that_peft_takes(make_model: MakeModel, peft_written: Written) -> None:
    _, folder = peft_written("llama", {"r": 4, "target_modules": ["q_proj"]})
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')
    theirs = PeftModel.from_pretrained(make_model("llama"), folder).eval()
    model = make_model("llama")
    report = load_adapter(model, folder)
    assert {layer.scaling for layer in report.plan.layers} == {8 / 4}
    assert relative(logits(model), logits(theirs)) <= 1e-5


def test_names_that_match_nothing_here_are_left_out_with_a_warning(
    make_model: MakeModel, peft_written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT takes lists written for many architectures; the tensors in the file decide what the adapter is."""
    live, folder = peft_written(
        "llama", {"r": 4, "target_modules": ["q_proj", "query_key_value"], "modules_to_save": ["score", "lm_head"]}
    )
    model = make_model("llama")
    load_adapter(model, folder)
    assert relative(logits(model), logits(live)) <= 1e-5
    assert "'query_key_value'" in caplog.text and "'score'" in caplog.text
    save_adapter(model, tmp_path / "ours")
    assert sorted_config(folder) == sorted_config(tmp_path / "ours")


def test_an_adapter_that_was_swapped_in_loads_in_peft(make_model: MakeModel, peft_written: Written, tmp_path: Path) -> None:
    """PEFT's own hotswap leaves file and configuration at odds after a change of rank, and wipes adapters whose names hold
    the swapped one's."""
    live, folder = peft_written("llama", {"r": 5, "lora_alpha": 31, "use_rslora": True, "target_modules": ["k_proj", "q_proj"]})
    model = make_model("llama")
    attach(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "sql")
    attach(model, LoraConfig(r=3, target_modules=["q_proj", "k_proj"]), "sql2")
    swap_adapter(model, folder, "sql")
    save_adapter(model, tmp_path / "ours", "sql")
    theirs = PeftModel.from_pretrained(make_model("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits(theirs), logits(live))
    assert relative(logits(model), logits(live)) <= 1e-5
    assert same_tensors(folder, tmp_path / "ours") and sorted_config(folder) == sorted_config(tmp_path / "ours")


def test_an_adapter_on_disk_says_what_peft_says(make_model: MakeModel, peft_written: Written, tmp_path: Path) -> None:
    """The same keys in the file, so that a reader which asks for one (vLLM asks for several) finds it in both."""
    case = CASES[0]
    _, folder = peft_written(case.model, case.config)
    ours_written(make_model, case, tmp_path / "ours")
    assert sorted_config(folder) == sorted_config(tmp_path / "ours")
