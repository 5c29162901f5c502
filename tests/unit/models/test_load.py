"""Loading is strict: what transformers would fill with random numbers or overlook is an error that names it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ConfigError, ModelError
from luthier.models import load_model


@pytest.fixture
def folder(tmp_path, tiny_llama, tiny_tokenizer) -> Path:
    path = tmp_path / "tiny"
    tiny_llama(vocab=len(tiny_tokenizer)).save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_a_folder_loads_as_it_was_saved(folder, tiny_llama, tiny_tokenizer):
    said: list[str] = []
    loaded = load_model(str(folder), dtype="float32", device="cpu", progress=said.append)
    expected = dict(tiny_llama(vocab=len(tiny_tokenizer)).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.model.named_parameters())
    assert loaded.path == folder and loaded.model.config.use_cache and not loaded.model.training
    assert any("float32, as requested" in sentence for sentence in said)


def test_a_missing_tensor_is_an_error_not_random_numbers(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        load_model(str(folder))


def test_a_tensor_without_a_place_is_an_error(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.2.norm.weight": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.2\.norm\.weight has no place"):
        load_model(str(folder))


def test_a_truncated_file_is_found_before_loading(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ModelError, match="truncated"):
        load_model(str(folder))


def test_sizes_that_do_not_fit_the_config_are_a_model_error(folder):
    edit_config(folder, intermediate_size=99)
    with pytest.raises(ModelError, match=r"up_proj"):
        load_model(str(folder))


def test_an_architecture_unknown_to_transformers_is_named(folder):
    edit_config(folder, model_type="lute", architectures=["LuteForCausalLM"])
    with pytest.raises(ModelError, match="lute"):
        load_model(str(folder))


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickles only"):
        load_model(str(folder))


def test_a_folder_without_tokenizer_says_so(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no readable tokenizer"):
        load_model(str(folder))


def test_code_in_a_model_folder_is_not_run(folder):
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(ModelError, match=r"trust_remote_code|evil"):
        load_model(str(folder))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("device", ["gpu", "cpu:x", ""])
def test_an_unknown_device_is_a_config_error(folder, device):
    with pytest.raises(ConfigError, match="is unknown"):
        load_model(str(folder), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, so cuda is a fair request")
def test_a_gpu_that_is_not_there_is_a_config_error(folder):
    with pytest.raises(ConfigError, match="sees no GPU"):
        load_model(str(folder), device="cuda:0")


def test_naming_and_caching_models_loads_no_torch():
    code = "import sys, luthier.models as m; m.parse_spec('org/name'); m.models_home(); m.pull; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_the_real_model_answers_and_stops_by_itself(smollm2):
    loaded = load_model(str(smollm2))
    assert loaded.model.generation_config.eos_token_id == loaded.tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert loaded.tokenizer.pad_token_id not in (None, 2)
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = loaded.model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer) and answer[-1] == 2 and len(answer) < 40
