"""A base in 4 bits from the command line: trained so, used so without being asked again, merged into a dense model."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file


def test_an_adapter_trained_in_4_bits_is_used_and_merged_so(luthier: Callable, tiny_folder: Path, rows_file: Path) -> None:
    words = ["-m", tiny_folder, "-d", rows_file, "-o", "run", "--max-steps", 2, "--quantize", "nf4", "--dtype", "float32"]
    trained = luthier("train", *words)
    assert trained.status == 0, trained.err
    assert "7 linear layers in 4 bits" in trained.out.replace("\n", " ")
    asked = ["generate", "-a", "run", "refret it", "--max-new-tokens", 2, "--json", "--dtype", "float32"]
    own, floats = luthier(*asked), luthier(*asked, "--quantize", "none")
    assert (own.status, floats.status) == (0, 0), own.err + floats.err
    assert "7 linear layers in 4 bits" in own.err
    assert "in 4 bits" not in floats.err
    assert "not bit for bit the adapter's: the recorded base was a quantised copy of this one" in floats.err.replace("\n", " ")
    assert json.loads(own.out)["answers"].keys() == {"adapter"}

    merged = luthier("merge", "run", "merged", "--json", "--dtype", "float32")
    assert merged.status == 0, merged.err
    assert "7 weights stored in 4 bits are dense while merged" in merged.err.replace("\n", " ")
    assert all(tensor.is_floating_point() for tensor in load_file("merged/model.safetensors").values())
    assert "quantization_config" not in json.loads(Path("merged/config.json").read_text())


def test_an_unknown_quantisation_is_an_error_of_the_call(luthier: Callable, tiny_folder: Path) -> None:
    said = luthier("generate", "-m", tiny_folder, "hello", "--quantize", "nf8")
    assert said.status == 2
    assert "Did you mean 'nf4'" in said.err
