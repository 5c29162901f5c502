"""`luthier serve --engine vllm` before vLLM starts: what it refuses, and what it makes of its options. For more: tests/vllm."""

from pathlib import Path

import pytest

from luthier.registry.place import open_registry

VLLM = ("--engine", "vllm", "--port", 0)


def test_options_of_the_other_engine_are_refused(luthier, tiny_folder):
    found = luthier("serve", tiny_folder, *VLLM, "--form", "int8", "--kv-tokens", 5)
    assert found.status == 2 and "--form and --kv-tokens would have no effect on vLLM" in found.err


@pytest.mark.parametrize("words", [("--vllm", "kv_gib=3"), ("--vllm-python", "/x/python")])
def test_options_of_vllm_are_refused_with_other_engines(luthier, tiny_folder, words):
    found = luthier("serve", tiny_folder, "--port", 0, *words)
    assert found.status == 2 and "only with --engine vllm" in found.err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_lora_ranks=8", "Did you mean 'max_lora_rank'"),
        ("kv_gib", "write KEY=VALUE"),
        ("max_lora_rank=9", "vLLM takes 1, 8, 16"),
        ("network=moon", "network"),
        ("kv_gib=many", "kv_gib"),
    ],
)
def test_settings_that_vllm_cannot_have_are_refused(luthier, tiny_folder, word, said):
    found = luthier("serve", tiny_folder, *VLLM, "--vllm", word)
    assert found.status == 2 and said in found.err


def test_a_registry_has_to_be_there(luthier, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_REGISTRY", str(tmp_path / "nowhere"))
    found = luthier("serve", tiny_folder, *VLLM)
    assert found.status == 1 and "There is no registry" in found.err


def test_a_python_has_to_be_named(luthier, tiny_folder, monkeypatch, tmp_path):
    monkeypatch.delenv("LUTHIER_VLLM_PYTHON", raising=False)
    open_registry(tmp_path / "registry", create=True).database.engine.dispose()
    found = luthier("serve", tiny_folder, *VLLM, "--registry", Path(tmp_path / "registry"))
    assert found.status == 2 and "--vllm-python" in found.err and "docs/vllm.md" in found.err
