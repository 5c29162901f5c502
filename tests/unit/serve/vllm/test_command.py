"""How vLLM is started: what stands on its command line and in its environment, and what does not."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from luthier.core.errors import ConfigError
from luthier.serve.vllm.checking import Served, check_for_vllm
from luthier.serve.vllm.command import RAW_BASE, ZERO, Place, command, environment, write_zero
from luthier.serve.vllm.plugin import is_reference
from luthier.serve.vllm.settings import PYTHON, VllmSettings
from luthier.serve.vllm.supervisor import allowed_network

SETTINGS = VllmSettings(python=Path("/vllm/python"), max_loras=3, max_cpu_loras=9, dtype="float32")


def flags(words: list[str]) -> dict[str, str]:
    return {word: following for word, following in zip(words, [*words[1:], ""], strict=True) if word.startswith("--")}


def test_one_socket_and_no_port(tmp_path):
    words = command(Path("/base"), Place(tmp_path), SETTINGS, 16, None)
    told = flags(words)
    assert told["--uds"] == str(tmp_path / "api")
    assert not {"--host", "--port", "--api-key"} & told.keys()  # a key on the command line is read by everybody
    assert told["--middleware"] == "luthier.serve.vllm.guard.KeyGuard"
    assert words[:3] == ["/vllm/python", "-m", "vllm.entrypoints.openai.api_server"]


def test_the_bare_base_has_a_slot_of_its_own_where_it_is_an_adapter(tmp_path):
    with_zero = flags(command(Path("/base"), Place(tmp_path), SETTINGS, 16, Path("/zero")))
    without = flags(command(Path("/base"), Place(tmp_path), SETTINGS, 64, None))
    assert (with_zero["--max-loras"], with_zero["--lora-modules"]) == ("4", f"{ZERO}=/zero")
    assert (without["--max-loras"], without["--max-lora-rank"]) == ("3", "64") and "--lora-modules" not in without


def test_no_version_can_have_the_name_of_the_base():
    assert not is_reference(RAW_BASE) and not is_reference(ZERO)


def test_further_words_come_last(tmp_path):
    settings = SETTINGS.changed(more=("--tensor-parallel-size", "2"))
    assert command(Path("/base"), Place(tmp_path), settings, 16, None)[-2:] == ["--tensor-parallel-size", "2"]


def test_nothing_is_sent_out_and_nothing_else_loads_adapters(tmp_path):
    given = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_USE_RUST_FRONTEND": "1", "VLLM_PLUGINS": "x", "VLLM_PORT": "9", "PATH": "/bin"}
    told = environment(Place(tmp_path), SETTINGS, 16, "key", "/registry", given)
    assert told["VLLM_PLUGINS"] == "luthier"
    assert told["VLLM_NO_USAGE_STATS"] == told["VLLM_DO_NOT_TRACK"] == told["DO_NOT_TRACK"] == told["HF_HUB_OFFLINE"] == "1"
    assert not {"VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_FRONTEND", "VLLM_PORT"} & told.keys()
    assert (told["PATH"], told["LUTHIER_REGISTRY"], told["VLLM_API_KEY"]) == ("/bin", "/registry", "key")
    assert told["VLLM_HOST_IP"] == "127.0.0.1" and told["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_the_machine_says_of_its_addresses_counts(tmp_path):
    told = environment(Place(tmp_path), SETTINGS, 16, "key", None, {"VLLM_HOST_IP": "10.0.0.7"})
    assert told["VLLM_HOST_IP"] == "10.0.0.7" and "LUTHIER_REGISTRY" not in told


def test_the_adapter_that_changes_nothing_is_a_real_one_of_zeros(served, tmp_path):
    folder = write_zero(tmp_path, served)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight": (1, 48),
        "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight": (48, 1),
    }
    assert not any(tensor.any() for tensor in tensors.values())
    assert check_for_vllm(folder, served, 1) == []
    assert write_zero(tmp_path, served) == folder  # the same content has the same place


def test_of_an_unusual_base_it_takes_any_layer(tmp_path):
    folder = write_zero(tmp_path, Served({}, {"h.1.mixer": (3, 5), "h.0.mixer": (3, 5)}))
    assert "base_model.model.h.0.mixer.lora_A.weight" in load_file(folder / "adapter_model.safetensors")


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="vLLM takes 1, 8, 16"):
        VllmSettings(max_lora_rank=12)
    with pytest.raises(ConfigError, match="the bare base has a place too"):
        VllmSettings(max_loras=8, max_cpu_loras=8)


def test_the_python_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv(PYTHON, "/somewhere/python")
    assert VllmSettings().program == Path("/somewhere/python")
    assert VllmSettings(python=Path("/here/python")).program == Path("/here/python")


@pytest.mark.parametrize(
    ("asked", "registry", "given"),
    [
        ("auto", None, "auto"),
        ("auto", "/var/lib/registry", "auto"),
        ("auto", "sqlite:////var/lib/registry.sqlite3", "auto"),
        ("auto", "postgresql://luthier@db/registry?blobs=s3://b/p", "host"),
        ("host", None, "host"),
        ("none", "/var/lib/registry", "none"),
    ],
)
def test_a_registry_behind_a_network_needs_one(asked, registry, given, monkeypatch):
    monkeypatch.delenv("LUTHIER_BLOBS", raising=False)
    assert allowed_network(asked, registry) == given


def test_none_and_a_registry_behind_a_network_do_not_go_together(monkeypatch):
    monkeypatch.delenv("LUTHIER_BLOBS", raising=False)
    with pytest.raises(ConfigError, match="network=host"):
        allowed_network("none", "postgresql://luthier@db/registry")
    monkeypatch.setenv("LUTHIER_BLOBS", "s3://bucket/prefix")
    assert allowed_network("auto", "/var/lib/registry") == "host"
