"""`luthier truncate` on an adapter that the loop has trained: what it says, and what PEFT computes with what it wrote."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Luthier = Callable[..., Any]


def updates_of(adapter: Path) -> dict[str, torch.Tensor]:
    """Return path -> the dense update in float64, read by hand from the two files."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, lora_A in stored.items():
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            scaling = config["lora_alpha"] / config["r"]
            found[path] = scaling * stored[key.replace("lora_A", "lora_B")].double() @ lora_A.double()
    return found


@pytest.mark.parametrize("asked", [("--rank", 3), ("--energy", 0.9)], ids=["rank", "energy"])
def test_peft_computes_what_the_dense_decomposition_foretells(
    luthier: Luthier, trained: Path, tiny_folder: Path, asked: tuple[str, object], tmp_path: Path
) -> None:
    said = luthier("truncate", trained, "--out", "cut", *asked, "--json")
    assert said.status == 0, said.err
    found = json.loads(said.out)
    ranks = {layer["path"]: layer["r_after"] for layer in found["layers"]}
    assert set(ranks.values()) == {3} if asked[0] == "--rank" else len(set(ranks.values())) > 1
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval()
    whole = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float64).eval()
    lost = total = 0.0
    with torch.no_grad():
        for path, update in updates_of(trained / "adapter").items():
            U, S, Vt = torch.linalg.svd(update, full_matrices=False)
            r = ranks[path]
            dense.get_parameter(f"{path}.weight").add_(U[:, :r] * S[:r] @ Vt[:r])
            whole.get_parameter(f"{path}.weight").add_(update)
            lost, total = lost + float(S[r:].square().sum()), total + float(S.square().sum())
    assert found["predicted"] == pytest.approx((lost / total) ** 0.5, rel=1e-6)
    assert found["measured"] == pytest.approx(found["predicted"], rel=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "cut").eval()
    ids = torch.randint(0, 300, (2, 17))
    with torch.no_grad():
        expected, given, got = dense(ids).logits, whole(ids).logits, theirs(ids).logits.double()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (given - expected).abs().max() > 1e-3 * expected.abs().max(), "nothing was cut: nothing was compared"


def test_truncate_says_what_was_lost(luthier: Luthier, trained: Path, tmp_path: Path) -> None:
    said = luthier("truncate", trained, "-o", "cut", "--rank", "3", "--layers")
    assert said.status == 0
    assert "model.layers.0.self_attn.v_proj" in said.out and "16 -> 3" in said.out and "foretold" in said.out
    assert "model.layers" not in luthier("truncate", trained, "-o", "short", "--rank", "3").out
    generated = luthier("generate", "refret", "-a", "cut", "--max-new-tokens", "3", "--json")
    assert generated.status == 0, generated.err  # the base is found and known by its fingerprint
    wrong = luthier("truncate", trained, "-o", "other")
    assert wrong.status == 2 and "say either how many ranks" in wrong.err and not (tmp_path / "other").exists()
