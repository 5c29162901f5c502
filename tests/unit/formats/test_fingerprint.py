"""Who a base model is: the same weights are known under any dtype or file layout, other weights never pass for them.

The quantisers here are written out independently of luthier's: NF4's published table, GGUF's Q4_1 and Q8_0 block rules.
"""

import base64
import hashlib
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ModelError
from luthier.formats.fingerprint import SCHEME, Fingerprint, Verdict, compare, fingerprint, full_digest

Tensors = dict[str, torch.Tensor]

NF4_LEVELS = torch.tensor(  # Dettmers et al. 2023, appendix E
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4(weight: torch.Tensor, scale_noise: float = 0.0) -> torch.Tensor:
    """Nearest NF4 level in blocks of 64; `scale_noise` is the relative error of double-quantised scales."""
    blocks = weight.float().reshape(-1, 64)
    scale = blocks.abs().amax(1, keepdim=True)
    codes = torch.bucketize(blocks / scale, (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2)
    return (NF4_LEVELS[codes] * scale * (1 + scale_noise * torch.randn_like(scale))).reshape(weight.shape).to(weight.dtype)


def q4_1(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().reshape(-1, 32)
    low = blocks.amin(1, keepdim=True)
    step = (blocks.amax(1, keepdim=True) - low) / 15
    codes = ((blocks - low) / step + 0.5).floor().clamp(0, 15)
    return (codes * step.half().float() + low.half().float()).reshape(weight.shape).to(weight.dtype)


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    blocks = weight.float().reshape(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127
    return ((blocks / step).round() * step.half().float()).reshape(weight.shape).to(weight.dtype)


def int8_rows(weight: torch.Tensor) -> torch.Tensor:
    step = weight.float().abs().amax(1, keepdim=True) / 127
    return ((weight.float() / step).round() * step).to(weight.dtype)


def merged(tensors: Tensors, size: float, only: str = "") -> Tensors:
    """A rank-4 update of the given relative size folded into every projection whose name holds `only`."""
    result = dict(tensors)
    for name in projections(tensors):
        if only in name:
            weight = tensors[name].float()
            delta = torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])
            result[name] = (weight + delta * size * weight.norm() / delta.norm()).to(tensors[name].dtype)
    return result


def projections(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def quantised(tensors: Tensors, quantise: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return tensors | {name: quantise(tensors[name]) for name in projections(tensors)}


@pytest.fixture(autouse=True)
def _one_thread(_same_start) -> None:
    """Hundreds of small tensors: a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tiny_llama) -> tuple[Tensors, dict]:
    """Twelve layers, so that 84 projections are sketched, and norms that are not all ones."""
    model = tiny_llama(layers=12, hidden=192, intermediate_size=320, vocab=331, dtype=torch.bfloat16, tie_word_embeddings=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        if tensor.ndim == 1:
            tensor.add_((0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype))
    return tensors, model.config.to_dict()


def verdict(recorded: Tensors, now: Tensors, config: dict) -> Verdict:
    return compare(fingerprint(recorded.items(), config), fingerprint(now.items(), config)).verdict


def test_float32_and_bfloat16_copies_have_one_fingerprint(base):
    tensors, config = base
    wide = [(name, tensor.float()) for name, tensor in tensors.items()]
    assert fingerprint(wide, config | {"dtype": "float32"}) == fingerprint(tensors.items(), config)


def test_order_and_memory_layout_do_not_matter(base):
    tensors, config = base
    shuffled = [(name, tensor.t().contiguous().t() if tensor.ndim == 2 else tensor) for name, tensor in reversed(tensors.items())]
    assert fingerprint(shuffled, config) == fingerprint(tensors.items(), config)


def test_a_tied_head_counts_once_whether_it_is_listed_or_not(base):
    tensors, config = base
    listed = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    assert fingerprint(listed.items(), config) == fingerprint(tensors.items(), config)
    untied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}
    assert verdict(tensors, untied, config) is Verdict.MISMATCH


def test_a_fingerprint_survives_json_and_stays_small(base):
    tensors, config = base
    taken = fingerprint(tensors.items(), config)
    text = taken.model_dump_json()
    assert Fingerprint.model_validate_json(text) == taken
    assert json.loads(text)["scheme"] == SCHEME
    assert len(text) < 400 * len(tensors)


def test_a_float16_copy_of_a_bfloat16_checkpoint_is_the_same_base():
    # Values down to 2^-20: below 2^-14 float16 loses bits that bfloat16 has.
    generator = torch.Generator().manual_seed(3)
    tensors = {f"layers.{n}.weight": (torch.randn(61, 67, generator=generator) * 2.0 ** (-6 * n)).bfloat16() for n in range(4)}
    tensors["norm.weight"] = torch.rand(67, generator=generator).bfloat16() * 1e-4
    half = {name: tensor.half() for name, tensor in tensors.items()}
    assert any(not torch.equal(half[name].bfloat16(), tensor) for name, tensor in tensors.items())
    assert compare(fingerprint(tensors.items(), {}), fingerprint(half.items(), {})).verdict is Verdict.EXACT


def test_a_fingerprint_of_another_scheme_says_nothing():
    taken = fingerprint([("a.weight", torch.randn(7, 13))], {})
    older = taken.model_copy(update={"scheme": "luthier-base-1"})
    found = compare(older, taken)
    assert found.verdict is Verdict.UNKNOWN
    assert "luthier-base-1" in found.reason


def test_the_sketch_holds_the_bfloat16_values_of_the_middle(base):
    tensors, config = base
    name = "model.layers.3.mlp.down_proj.weight"  # 192 x 320 = 61,440 elements; the middle is 30,720 = 480 runs of 64
    raw = base64.b64decode(fingerprint(tensors.items(), config).sketch[name])
    stored = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
    assert torch.equal(stored, tensors[name].reshape(-1)[30_720:30_784])


def test_the_same_weights_are_exact(base):
    tensors, config = base
    assert verdict(tensors, {name: tensor.clone() for name, tensor in tensors.items()}, config) is Verdict.EXACT


def test_nothing_recorded_is_unknown_and_so_is_another_scheme(base):
    tensors, config = base
    taken = fingerprint(tensors.items(), config)
    assert compare(None, taken).verdict is Verdict.UNKNOWN
    assert compare(taken.model_copy(update={"scheme": "luthier-base-0"}), taken).verdict is Verdict.UNKNOWN


def test_noise_of_a_fifth_of_a_percent_is_a_mismatch(base):
    tensors, config = base
    noisy = {name: (tensor.float() * (1 + 0.002 * torch.randn(tensor.shape))).bfloat16() for name, tensor in tensors.items()}
    told = compare(fingerprint(tensors.items(), config), fingerprint(noisy.items(), config))
    assert told.verdict is Verdict.MISMATCH and "norms and biases differ" in told.reason


@pytest.mark.parametrize("size", [0.002, 0.01, 0.05])
def test_a_merged_adapter_is_a_mismatch_and_the_reason_counts_tensors(base, size):
    tensors, config = base
    told = compare(fingerprint(tensors.items(), config), fingerprint(merged(tensors, size).items(), config))
    assert told.verdict is Verdict.MISMATCH
    assert f"84 of {len(tensors)} sampled tensors differ" in told.reason and "merged" in told.reason


def test_another_seed_is_a_mismatch_plain_and_quantised(base, tiny_llama):
    tensors, config = base
    other = tiny_llama(layers=12, hidden=192, intermediate_size=320, vocab=331, dtype=torch.bfloat16, seed=7)
    others = {name: parameter.detach() for name, parameter in other.named_parameters() if name in tensors}
    same_norms = others | {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    assert verdict(tensors, others, config) is Verdict.MISMATCH
    assert verdict(tensors, same_norms, config) is Verdict.MISMATCH
    assert verdict(tensors, quantised(same_norms, nf4), config) is Verdict.MISMATCH


@pytest.mark.parametrize(
    "quantise",
    [nf4, lambda weight: nf4(weight, scale_noise=0.004), q4_1, q8_0, int8_rows],
    ids=["nf4", "nf4-dq", "q4_1", "q8_0", "int8"],
)
def test_a_quantised_copy_is_known_and_a_quantised_merge_is_not(base, quantise):
    tensors, config = base
    assert verdict(tensors, quantised(tensors, quantise), config) is Verdict.QUANTISED_OF
    assert verdict(tensors, quantised(merged(tensors, 0.02), quantise), config) is Verdict.MISMATCH
    assert verdict(tensors, quantised(merged(tensors, 0.03, only="q_proj"), quantise), config) is Verdict.MISMATCH


def test_a_quantised_copy_of_float32_weights_is_known(base):
    tensors, config = base
    wide = {name: tensor.float() * 1.0007 for name, tensor in tensors.items()}  # values bfloat16 cannot hold
    assert verdict(wide, quantised(wide, nf4), config) is Verdict.QUANTISED_OF


def test_the_original_of_a_recorded_quantised_copy_is_known_but_a_merge_on_it_is_not(base):
    tensors, config = base
    small = quantised(tensors, nf4)
    assert verdict(small, tensors, config) is Verdict.QUANTISED_OF
    assert verdict(small, merged(tensors, 0.03), config) is Verdict.MISMATCH
    assert verdict(small, merged(small, 0.01), config) is Verdict.MISMATCH


def test_a_method_that_cannot_be_checked_is_declared_only_if_the_norms_agree(base):
    tensors, config = base
    said = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    drifted = merged(tensors, 0.08)
    assert compare(fingerprint(tensors.items(), config), fingerprint(drifted.items(), said)).verdict is Verdict.DECLARED
    no_norms = drifted | {"model.norm.weight": tensors["model.norm.weight"] * 1.5}
    assert compare(fingerprint(tensors.items(), config), fingerprint(no_norms.items(), said)).verdict is Verdict.MISMATCH


def test_a_change_too_small_for_four_bits_passes_as_the_docstring_says(base):
    tensors, config = base
    assert verdict(tensors, quantised(merged(tensors, 0.001), nf4), config) is Verdict.QUANTISED_OF


def test_another_architecture_names_the_key_and_both_values(base):
    tensors, config = base
    other = config | {"num_key_value_heads": 4, "_name_or_path": "elsewhere", "transformers_version": "1"}
    told = compare(fingerprint(tensors.items(), config), fingerprint(tensors.items(), other))
    assert told.verdict is Verdict.MISMATCH and "num_key_value_heads was 2, is 4" in told.reason
    renamed = config | {"_name_or_path": "elsewhere", "transformers_version": "1", "dtype": "float16"}
    assert compare(fingerprint(tensors.items(), config), fingerprint(tensors.items(), renamed)).verdict is Verdict.EXACT


def test_a_missing_tensor_is_named(base):
    tensors, config = base
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.11.self_attn.v_proj" not in name}
    told = compare(fingerprint(tensors.items(), config), fingerprint(fewer.items(), config))
    assert told.verdict is Verdict.MISMATCH and "layers.11.self_attn.v_proj" in told.reason


def test_tensors_without_readable_values_are_all_named():
    bad = [
        ("a", torch.empty(3, device="meta")),
        ("b", torch.zeros(8, dtype=torch.uint8)),
        ("c", torch.ones(2)),
        ("c", torch.ones(2)),
    ]
    with pytest.raises(ModelError, match=r"(?s)3 tensors.*a is on the meta device.*b is torch.uint8.*c was given twice"):
        fingerprint(bad, {})
    with pytest.raises(ModelError, match="without tensors"):
        fingerprint([], {})


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (123, 7), (64, 64), (2, 3, 5)])
def test_odd_shapes_have_a_fingerprint_and_one_changed_value_shows(shape):
    weight = torch.randn(shape)
    changed = weight.clone()
    changed.view(-1)[-1] += 1
    assert verdict({"w": weight}, {"w": weight.clone()}, {}) is Verdict.EXACT
    assert verdict({"w": weight}, {"w": changed}, {}) is Verdict.MISMATCH


def test_weights_of_zero_never_pass_for_a_quantised_copy():
    assert verdict({"w": torch.randn(64, 64)}, {"w": torch.zeros(64, 64)}, {}) is Verdict.MISMATCH


def test_full_digest_does_not_depend_on_shards_and_sees_every_byte(tmp_path):
    tensors = {"a.weight": torch.randn(7, 13), "b.weight": torch.randn(123).bfloat16(), "c": torch.zeros(0, 4)}
    whole, split, touched = (tmp_path / name for name in ("whole", "split", "touched"))
    for folder in (whole, split, touched):
        folder.mkdir()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    save_file({"a.weight": tensors["a.weight"]}, split / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in ("b.weight", "c")}, split / "model-00002-of-00002.safetensors")
    save_file(tensors | {"b.weight": tensors["b.weight"].roll(1)}, touched / "model.safetensors")
    assert full_digest(whole) == full_digest(split) == full_digest(whole / "model.safetensors")
    assert full_digest(touched) != full_digest(whole)


def test_full_digest_is_the_documented_sum(tmp_path):
    """Computed here from the tensors themselves, by hashlib alone."""

    def digest(*parts: str) -> str:
        return hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part.encode() for part in parts)).hexdigest()

    file = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, file)
    content = hashlib.sha256(load_file(file)["w"].numpy().tobytes()).hexdigest()
    assert full_digest(tmp_path) == digest("w", digest("F32", "(2, 3)", content))


def test_full_digest_refuses_a_truncated_file_and_a_tensor_stored_twice(tmp_path):
    save_file({"w": torch.randn(5, 5)}, tmp_path / "a.safetensors")
    save_file({"w": torch.randn(5, 5)}, tmp_path / "b.safetensors")
    with pytest.raises(ModelError, match="stored twice"):
        full_digest(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-3])
    with pytest.raises(ModelError, match="truncated"):
        full_digest(tmp_path)


@pytest.mark.slow
def test_the_real_model_is_told_from_its_quantised_and_merged_copies(smollm2):
    tensors = load_file(smollm2 / "model.safetensors")
    config = json.loads((smollm2 / "config.json").read_text())
    taken = fingerprint(tensors.items(), config)
    assert len(taken.model_dump_json()) < 100_000
    assert verdict(tensors, quantised(tensors, nf4), config) is Verdict.QUANTISED_OF
    assert verdict(tensors, merged(tensors, 0.01, only="v_proj"), config) is Verdict.MISMATCH
    assert verdict(tensors, quantised(merged(tensors, 0.01), nf4), config) is Verdict.MISMATCH
