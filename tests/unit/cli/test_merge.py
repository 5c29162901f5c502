"""`luthier merge` says what each form leaves of the adapter, and writes 4 bits only where that was asked for by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Luthier = Callable[..., Any]


def test_the_report_is_of_the_weights_that_were_written(luthier: Luthier, trained: Path, tiny_folder: Path) -> None:
    said = luthier("merge", trained, "merged", "--dtype", "bfloat16", "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    assert found["written"] == "bfloat16"
    assert "bfloat16 *" in said.err
    total = found["survival"]["total"]
    assert set(total["exports"]) == {"float32", "bfloat16", "float16", "nf4"}
    assert {kind["kind"] for kind in found["survival"]["kinds"]} == {
        *(f"{letter}_proj" for letter in "qkvo"),
        *(f"{name}_proj" for name in ("gate", "up", "down")),
    }
    # From the files alone, in float64: base, adapter, merged.
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).state_dict()
    adapter, merged = (
        load_file(path) for path in (trained / "adapter/adapter_model.safetensors", Path("merged/model.safetensors"))
    )
    config = json.loads((trained / "adapter/adapter_config.json").read_text())
    dot = size = missed = 0.0
    for key in adapter:
        if ".lora_A." in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "")
            lora_B = adapter[key.replace("lora_A", "lora_B")]
            change = config["lora_alpha"] / config["r"] * lora_B.double() @ adapter[key].double()
            moved = merged[name].double() - base[name].double()
            dot, size = dot + float((moved * change).sum()), size + float(change.square().sum())
            missed += float((moved - change).square().sum())
    assert total["exports"]["bfloat16"]["kept"] == pytest.approx(dot / size, abs=1e-5)
    assert total["exports"]["bfloat16"]["error"] == pytest.approx((missed / size) ** 0.5, rel=1e-3)


def test_4_bits_are_written_where_they_are_asked_for_and_it_is_said_what_that_loses(luthier: Luthier, trained: Path) -> None:
    said = luthier("merge", trained, "small", "--to", "nf4", "--dtype", "float32", "--json")
    assert said.status == 0, said.err
    found, words = json.loads(said.out), " ".join(said.err.split())
    assert found["written"] == "nf4"
    left = found["survival"]["total"]["exports"]["nf4"]
    assert f"Written in 4 bits, as asked: {left['kept']:.1%} of the adapter's change is left" in words
    assert "Without --to nothing is put into 4 bits" in words
    assert "model.layers.0.mlp.up_proj.weight.absmax" in load_file("small/model.safetensors")
    again = luthier("generate", "-m", "small", "refret", "--max-new-tokens", 2, "--json", "--dtype", "float32")
    assert again.status == 0, again.err
    assert "7 linear layers in 4 bits" in " ".join(again.err.split())

    base_in_4_bits = luthier("merge", trained, "dense", "--quantize", "nf4", "--dtype", "float32", "--json")
    assert base_in_4_bits.status == 0, base_in_4_bits.err
    assert json.loads(base_in_4_bits.out)["written"] == "float32"
    assert all(tensor.is_floating_point() for tensor in load_file("dense/model.safetensors").values())
    assert "Merged into the float base" in " ".join(base_in_4_bits.err.split())


def test_an_unknown_form_is_an_error_before_anything_is_loaded(luthier: Luthier, trained: Path) -> None:
    said = luthier("merge", trained, "out", "--to", "nf8")
    assert said.status == 2
    assert "Did you mean 'nf4'" in said.err
    assert "Loading" not in said.out + said.err
    assert not Path("out").exists()
