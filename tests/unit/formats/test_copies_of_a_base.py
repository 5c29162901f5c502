"""One base in the forms that it is met in on disk, and its look-alikes: which ones are known, and which are refused.

Each form is written by the tool that people use for it (transformers, bitsandbytes, GGUF's own package), read by luthier, and
held against the fingerprint of the base as it was first.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from luthier.adapt import quantize_linears
from luthier.core.errors import ModelError
from luthier.formats import fingerprint_of, save_packed
from luthier.formats.fingerprint import Verdict, compare, fingerprint, verdict
from luthier.models import load_model

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    """A bfloat16 checkpoint of eight layers, whose norms are not all ones, in one file."""
    folder = tmp_path_factory.mktemp("base") / "base"
    model = _other(tiny_llama, tiny_tokenizer, seed=0)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def _other(tiny_llama, tiny_tokenizer, seed: int) -> nn.Module:
    model = tiny_llama(
        layers=8,
        hidden=128,
        intermediate_size=192,
        vocab=len(tiny_tokenizer),
        dtype=torch.bfloat16,
        seed=seed,
        attention_bias=True,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


@pytest.fixture(scope="module")
def recorded(base: Path) -> dict[str, Any]:
    """The fingerprint of the base as an adapter's note records it: plain JSON."""
    return json.loads(_taken(load_model(str(base), dtype="bfloat16").model))


def _taken(model: nn.Module) -> str:
    return fingerprint_of(model).model_dump_json()


def _model(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def merged(tensors: Tensors, size: float) -> Tensors:
    """A rank-4 update of the given relative size in every projection."""
    result = dict(tensors)
    for name in (name for name in tensors if name.endswith("_proj.weight")):
        weight = tensors[name].float()
        delta = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
        result[name] = (weight + delta * size * weight.norm() / delta.norm()).to(tensors[name].dtype)
    return result


def in_float32(base: Path, folder: Path) -> None:
    _model(base, torch.float32).save_pretrained(folder)


def resharded(base: Path, folder: Path) -> None:
    _model(base).save_pretrained(folder, max_shard_size="200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def in_nf4(base: Path, folder: Path) -> None:
    model = _model(base)
    quantize_linears(model)
    save_packed(model, folder)


def by_bitsandbytes(base: Path, folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=asked, device_map="cpu").save_pretrained(folder)


def perturbed(base: Path, folder: Path) -> None:
    model = _model(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.002 * torch.randn_like(parameter, dtype=torch.float32))
    model.save_pretrained(folder)


def with_a_merge(base: Path, folder: Path) -> None:
    model = _model(base)
    model.load_state_dict(merged(model.state_dict(), 0.01))
    model.save_pretrained(folder)


def with_a_merge_in_nf4(base: Path, folder: Path) -> None:
    model = _model(base)
    model.load_state_dict(merged(model.state_dict(), 0.01))
    quantize_linears(model)
    save_packed(model, folder)


FORMS = [
    (in_float32, Verdict.EXACT, "sampled tensors are equal"),
    (resharded, Verdict.EXACT, "sampled tensors are equal"),
    (in_nf4, Verdict.QUANTISED_OF, "quantised to 5 bits or fewer"),
    (by_bitsandbytes, Verdict.QUANTISED_OF, "quantised to 5 bits or fewer"),
    (perturbed, Verdict.MISMATCH, "norms and biases differ"),
    (with_a_merge, Verdict.MISMATCH, "a fine-tune or merged copy"),
    (with_a_merge_in_nf4, Verdict.MISMATCH, "a quantised copy of a fine-tuned or merged base"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "wanted", "why"), FORMS, ids=[make.__name__ for make, _, _ in FORMS])
def test_each_form_of_a_base_is_named(
    base: Path, recorded: dict, tiny_tokenizer, tmp_path: Path, make: Callable[[Path, Path], None], wanted: Verdict, why: str
) -> None:
    make(base, tmp_path / "copy")
    tiny_tokenizer.save_pretrained(tmp_path / "copy")
    model = load_model(str(tmp_path / "copy"), dtype="float32" if make is in_float32 else "bfloat16").model
    found = verdict(recorded, json.loads(_taken(model)))
    assert (found.verdict, why in found.reason) == (wanted, True), found.reason


def test_another_checkpoint_of_the_same_shape_is_refused(recorded: dict, tiny_llama, tiny_tokenizer) -> None:
    other = _other(tiny_llama, tiny_tokenizer, seed=1)
    assert verdict(recorded, json.loads(_taken(other))).verdict is Verdict.MISMATCH
    quantize_linears(other)
    assert verdict(recorded, json.loads(_taken(other))).verdict is Verdict.MISMATCH


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", "8 bits"), ("Q5_0", "5 bits"), ("Q4_0", "5 bits"), ("Q4_1", "5 bits")])
@pytest.mark.parametrize("embedding_too", [True, False])
def test_what_a_gguf_file_gives_back_is_named_for_what_it_is(base: Path, kind: str, bits: str, embedding_too: bool) -> None:
    """GGUF's package quantises and reads back; the embedding is among what such files quantise, the norms are not."""
    gguf = pytest.importorskip("gguf")
    code = gguf.GGMLQuantizationType[kind]
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())

    def through_gguf(weights: Tensors) -> Tensors:
        return {
            name: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.float().numpy(), code), code)).bfloat16()
            if weight.ndim > 1 and (embedding_too or name.endswith("_proj.weight"))
            else weight
            for name, weight in weights.items()
        }

    first = fingerprint(tensors.items(), config)
    told = compare(first, fingerprint(through_gguf(tensors).items(), config))
    assert told.verdict is Verdict.QUANTISED_OF and bits in told.reason
    back = compare(fingerprint(through_gguf(tensors).items(), config), first)
    assert back.verdict is Verdict.QUANTISED_OF and "was a quantised copy of this one" in back.reason
    assert compare(first, fingerprint(through_gguf(merged(tensors, 0.02)).items(), config)).verdict is Verdict.MISMATCH


def test_a_verdict_needs_no_torch(recorded: dict, tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps(recorded))
    script = (
        "import json, sys; from luthier.formats.fingerprint import verdict\n"
        f"base = json.load(open({str(tmp_path / 'base.json')!r}))\n"
        "print(verdict(base, base).verdict, verdict(None, base).verdict, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["exact", "unknown", "False"]


def test_a_damaged_record_is_an_error_and_not_an_unknown_base(recorded: dict) -> None:
    with pytest.raises(ModelError, match=r"of the recorded base is damaged(.|\n)*sketch"):
        verdict({key: value for key, value in recorded.items() if key != "sketch"}, recorded)


@pytest.mark.slow
def test_the_real_model_in_its_forms(smollm2: Path) -> None:
    """SmolLM2 was read from a GGUF file of Q4_1: its floats give that very file back, and are known from Q8_0 and Q4_0."""
    gguf = pytest.importorskip("gguf")
    tensors = load_file(smollm2 / "model.safetensors")
    config = json.loads((smollm2 / "config.json").read_text())
    projections = [name for name in tensors if name.endswith("_proj.weight")]
    first = fingerprint(tensors.items(), config)

    def told(changed: Tensors) -> Verdict:
        return compare(first, fingerprint((tensors | changed).items(), config)).verdict

    def through(kind: str) -> Tensors:
        code = gguf.GGMLQuantizationType[kind]
        read = {name: gguf.quants.quantize(tensors[name].float().numpy(), code) for name in projections}
        return {name: torch.from_numpy(gguf.quants.dequantize(raw, code)).bfloat16() for name, raw in read.items()}

    assert told({name: tensor.float() for name, tensor in tensors.items()}) is Verdict.EXACT
    assert told(through("Q4_1")) is Verdict.EXACT
    assert told(through("Q8_0")) is Verdict.QUANTISED_OF
    assert told(through("Q4_0")) is Verdict.QUANTISED_OF
    assert told(merged(tensors, 0.002)) is Verdict.MISMATCH
    noisy = {name: (tensor.float() * (1 + 0.002 * torch.randn(tensor.shape))).bfloat16() for name, tensor in tensors.items()}
    assert told(noisy) is Verdict.MISMATCH
