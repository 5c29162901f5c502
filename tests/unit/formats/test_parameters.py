"""Adapters of parameters in folders: what fits, what is told, and how large their updates are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.adapt import adapter_parameters, attach
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError, AdapterMismatchError
from luthier.formats.adapter_config import parse_config
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.contents import describe_adapter
from luthier.formats.folder import read_adapter
from luthier.formats.merged import save_merged

MakeMoe = Callable[..., nn.Module]
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]
BASE = "base_model.model.model.layers.0.mlp.experts"


def saved(model: nn.Module, folder: Path, **config: Any) -> Path:
    attach(model, LoraConfig(**({"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS} | config)))
    for item in adapter_parameters(model):
        nn.init.normal_(item.parameter, std=0.3)
    return save_adapter(model, folder)


def test_the_last_parameter_of_a_module_is_outermost(tiny_moe: MakeMoe, tmp_path: Path) -> None:
    folder = saved(tiny_moe("mixtral", layers=1), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.startswith(BASE)}
    # gate_up_proj (5, 48, 16) comes before down_proj (5, 16, 24) in the module, whatever the configuration's order is.
    assert shapes == {
        f"{BASE}.base_layer.lora_A.weight": (10, 16),
        f"{BASE}.base_layer.lora_B.weight": (48, 10),
        f"{BASE}.lora_A.weight": (10, 24),
        f"{BASE}.lora_B.weight": (16, 10),
    }
    assert "on experts.down_proj, experts.gate_up_proj, q_proj" in (folder / "README.md").read_text()


@pytest.mark.parametrize("rank_pattern", [{}, {"layers.0.*": 3}], ids=str)
def test_experts_are_told_one_by_one(tiny_moe: MakeMoe, tmp_path: Path, rank_pattern: dict[str, int]) -> None:
    model = tiny_moe("gpt_oss")
    described = describe_adapter(read_adapter(saved(model, tmp_path / "a", rank_pattern=rank_pattern)))
    layers = {layer["path"]: layer for layer in described["layers"]}
    assert described["targets"] == "experts.down_proj, experts.gate_up_proj, q_proj" and len(layers) == 2 + 2 * 2 * 5
    for index, r in enumerate((rank_pattern.get("layers.0.*", 2), 2)):
        path = f"model.layers.{index}.mlp.experts"
        pairs = model.get_submodule(path).lora["default"]
        for key, told in (("down_proj", path), ("gate_up_proj", f"{path}.base_layer")):
            A, B = (getattr(pairs.get_submodule(key), role).detach().double() for role in ("lora_A", "lora_B"))
            for e in range(5):
                update = 5 / r * B[:, e::5] @ A[r * e : r * e + r]
                assert layers[f"{told}.{e}"]["r"] == r
                assert layers[f"{told}.{e}"]["delta_norm"] == pytest.approx(float(update.norm()), rel=1e-9)


def test_pairs_whose_size_only_the_base_could_tell_are_left_out(tiny_moe: MakeMoe, tmp_path: Path) -> None:
    folder = saved(tiny_moe("mixtral", layers=1), tmp_path / "a", rank_pattern={"down_proj": 1})
    assert [layer["path"] for layer in describe_adapter(read_adapter(folder))["layers"]] == ["model.layers.0.self_attn.q_proj"]


def test_names_that_this_model_does_not_have_are_told_and_left_out(
    tiny_moe: MakeMoe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tiny_moe("mixtral", layers=1), tmp_path / "a")
    text = (folder / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(text.replace('"experts.down_proj"', '"experts.down_proj", "elsewhere.w3"'))
    (folder / "luthier.json").unlink()  # its digests are of the files before the edit
    report = load_adapter(tiny_moe("mixtral", layers=1), folder)
    assert "left out: 'elsewhere.w3'" in caplog.text
    assert report.plan.config.target_parameters == [EXPERTS[0], "elsewhere.w3", EXPERTS[1]]


def test_every_tensor_that_does_not_fit_is_told(tiny_moe: MakeMoe, tmp_path: Path) -> None:
    folder = saved(tiny_moe("mixtral", layers=1), tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"{BASE}.lora_A.weight"] = torch.zeros(8, 24)  # of four experts
    del tensors[f"{BASE}.base_layer.lora_B.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "luthier.json").unlink()  # its digests are of the file before the edit
    model = tiny_moe("mixtral", layers=1)
    with pytest.raises(AdapterMismatchError) as raised:
        load_adapter(model, folder)
    assert "experts.lora_A.weight is (8, 24), needs (10, 24)" in str(raised.value)
    assert "experts.base_layer.lora_B.weight is missing" in str(raised.value)
    assert not any(".lora." in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("others", [{"lora_dropout": 0.1}, {"use_dora": True}, {"peft_type": "ADALORA"}], ids=str)
def test_files_that_could_not_be_applied_are_refused(others: dict[str, Any]) -> None:
    with pytest.raises(AdapterFormatError, match="target_parameters"):
        parse_config(json.dumps({"peft_type": "LORA", "target_parameters": EXPERTS, "total_step": 9} | others), "here")


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_merged_checkpoint_is_read_back_by_plain_transformers(tiny_moe: MakeMoe, tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    model, ids = tiny_moe(model_type, layers=1), torch.tensor([[5, 17, 200, 3, 42]])
    saved(model, tmp_path / "a")
    save_merged(model, tmp_path / "merged")
    with torch.no_grad():
        unmerged = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", experts_implementation="eager").eval()(ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
