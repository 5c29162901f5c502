"""Who a base model is, by its weights: a small record made in a fraction of a second, and a verdict on two of them.

A name in a config file proves nothing, so an adapter carries the fingerprint of the base it was trained on. It has four parts:

    arch       the configuration keys that decide the computation
    anchor     every one-dimensional tensor (norms, biases), whole. 4-bit and 8-bit methods leave norms alone, so these stay
               equal under quantisation and differ after any full fine-tune. Embeddings have a digest of their own, because
               GGUF files quantise them too; it is a record and decides nothing
    sample     three slices of 2,048 elements of every tensor: finds a merged adapter, which leaves the anchors equal
    sketch     64 values in a row of every matrix: finds a merged adapter even behind 4-bit quantisation

Everything is taken after a cast to bfloat16, so float32 and bfloat16 copies of one checkpoint agree, and float16 copies of a
bfloat16 one: what is below float16's normal range counts as zero in the digests.

The sketch works because rounding to the nearest level can be checked (sketch.py says how). Rounding alone leaves 0 to 0.02 % of
the values in a wrong cell (NF4, Q4_1), 0.2 % where the scales were quantised too. An adapter merged into random weights before
NF4 puts 0.2 / 0.8 / 2 / 8 % there where it changed the weights by 0.2 / 0.5 / 1 / 3 % of their size, and before Q8_0 about 3 %
even for the smallest of these.

Blind spots, told rather than guessed at:
- behind 4 bits, a change below about 0.5 % of a weight's size passes as quantisation (1 % where only one kind of projection in
  30 layers is changed, more where fewer layers are); so may a large change of one or two layers;
- blocks of 16 (Q6_K, Q3_K, Q2_K) and methods that do not round to the nearest level (GPTQ, AWQ) get no `quantised-of`, only
  `declared` where the configuration names the method, else `mismatch`;
- a change elsewhere than in the sampled 6,144 elements of a tensor is seen by `full_digest` only;
- a float16 copy of a float32 checkpoint is rounded twice and counts as a mismatch (one of a bfloat16 checkpoint does not);
- the tokenizer and the chat template are not part of the weights.

This file never loads a model: it reads tensors it is given, or the bytes of safetensors files.
"""

import base64
import hashlib
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from luthier.core.errors import ModelError
from luthier.formats.sketch import Rounding, compare_sketches
from luthier.models.weights import read_entries, weight_files

if TYPE_CHECKING:
    import torch

SCHEME = "luthier-base-2"
"""Changes whenever the same weights would give another fingerprint."""

SLICE = 2048
FLOAT16_NORMAL = 2.0**-14
SKETCH_VALUES = 64
"""Per matrix. 64 x 2 bytes x 211 matrices are 36 KB in base64: enough values (13,504) to see a change of 0.5 % in every layer."""
SKETCH_TENSORS = 512
"""Beyond this many matrices (mixtures of experts) an even choice of them is sketched, so the record stays small."""

WRONG_BY_ROUNDING = 0.0025
"""The share of values in wrong cells that rounding alone explains: 0.02 % measured for plain NF4 and Q4_1, 0.2 % with quantised
scales. More than that by four standard deviations is another model."""
FILLED = 0.25
"""An original fills the cells of its quantised copy (median 0.5 of a half cell); dequantised weights changed a little do not."""

ROUNDING_METHODS = frozenset({"bitsandbytes", "gguf", "nf4", "luthier", "quanto"})
"""Declared methods whose result the sketch can check; of any other, only the declaration is known."""

_ARCH_WORDS = """
    model_type architectures text_config tie_word_embeddings vocab_size hidden_size intermediate_size num_hidden_layers
    num_attention_heads num_key_value_heads head_dim hidden_act hidden_activation activation_function rms_norm_eps
    layer_norm_eps layer_norm_epsilon attention_bias mlp_bias max_position_embeddings rope_theta rope_scaling
    rope_parameters partial_rotary_factor sliding_window layer_types query_pre_attn_scalar attn_logit_softcapping
    final_logit_softcapping logit_scale logits_scaling embedding_multiplier attention_multiplier residual_multiplier
    num_experts num_local_experts num_experts_per_tok moe_intermediate_size shared_expert_intermediate_size n_routed_experts
    n_shared_experts first_k_dense_replace norm_topk_prob q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim
    v_head_dim n_embd n_layer n_head n_inner n_positions d_model d_ff d_kv num_layers num_heads num_decoder_layers
"""
ARCH_KEYS = frozenset(_ARCH_WORDS.split())
"""Configuration keys that change what the weights compute. Names, dtypes, library versions and quantisation are left out."""

_EMBEDDING = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared)(\.|$)")


class Verdict(StrEnum):
    """What a base is to the one an adapter was trained on."""

    EXACT = "exact"
    QUANTISED_OF = "quantised-of"
    DECLARED = "declared"
    UNKNOWN = "unknown"
    MISMATCH = "mismatch"


@dataclass(frozen=True)
class Comparison:
    """A verdict and the sentence that justifies it; the sentence is meant to be printed."""

    verdict: Verdict
    reason: str


class Fingerprint(BaseModel):
    """Who a base model is. Plain JSON; equal fingerprints mean equal weights as far as the sample reaches."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    scheme: str = SCHEME
    arch: dict[str, Any]
    arch_digest: str
    anchor_digest: str
    embedding_digest: str
    sample_digest: str
    quantisation: str | None = None
    """The method the configuration declares (quantization_config.quant_method)."""
    anchors: dict[str, str]
    """One-dimensional tensor -> short digest, so that a message can count what differs."""
    matrices: dict[str, str]
    """Every other tensor -> short digest of its shape and samples."""
    sketch: dict[str, str]
    """Matrix -> SKETCH_VALUES bfloat16 values from its middle, base64."""

    def identity(self) -> str:
        """Return one digest that names the architecture and the sampled weights together, for use as a key."""
        return _digest(self.scheme, self.arch_digest, self.sample_digest)


def fingerprint(named_tensors: "Iterable[tuple[str, torch.Tensor]]", config: Mapping[str, Any]) -> Fingerprint:
    """Return who the base model is that holds these tensors.

    Pass the base's own `named_parameters()`, without adapters, dequantised where they are stored packed; and its configuration as
    a mapping. Order, device, sharding on disk and float32 against bfloat16 make no difference.
    Raises: ModelError naming every tensor that has no readable values.
    """
    anchors: dict[str, str] = {}
    matrices: dict[str, str] = {}
    values: dict[str, bytes] = {}
    faults: list[str] = []
    for name, tensor in named_tensors:
        if tensor.is_meta or not tensor.is_floating_point() or name in anchors or name in matrices:
            faults.append(f"  {name} {_fault(tensor)}")
        elif tensor.ndim < 2:
            anchors[name] = _digest(str(tuple(tensor.shape)), _bytes(tensor.detach().reshape(-1)))
        else:
            samples, run = _sample(tensor.detach())
            matrices[name] = _digest(str(tuple(tensor.shape)), samples)
            values[name] = run
    if faults:
        raise ModelError(f"Cannot fingerprint this model ({len(faults)} tensors):\n" + "\n".join(faults[:20]))
    if not anchors and not matrices:
        raise ModelError("Cannot fingerprint a model without tensors.")

    _drop_tied_head(matrices, values, config)
    chosen = sorted(values)[:: -(-len(values) // SKETCH_TENSORS) or 1]
    arch = _architecture(config)
    embeddings = {name: digest for name, digest in matrices.items() if _EMBEDDING.search(name)}
    return Fingerprint(
        arch=arch,
        arch_digest=_digest(json.dumps(arch, sort_keys=True, separators=(",", ":"))),
        anchor_digest=_digest_all(anchors),
        embedding_digest=_digest_all(embeddings),
        sample_digest=_digest_all(anchors | matrices),
        quantisation=_declared_quantisation(config),
        anchors={name: digest[:16] for name, digest in sorted(anchors.items())},
        matrices={name: digest[:16] for name, digest in sorted(matrices.items())},
        sketch={name: base64.b64encode(values[name]).decode() for name in chosen},
    )


def compare(recorded: Fingerprint | None, base: Fingerprint) -> Comparison:
    """Judge whether `base` is the model `recorded` was taken of, and say why in words.

    `quantised-of` means: the norms agree, and every stored value that differs is its recorded value rounded to one of few levels.
    `declared` means: the norms agree and the base's configuration says how it was quantised, but that method cannot be checked.
    """
    if recorded is None:
        return Comparison(Verdict.UNKNOWN, "no fingerprint of a base was recorded")
    if recorded.scheme != base.scheme:
        return Comparison(Verdict.UNKNOWN, f"its fingerprint was taken by another scheme ({recorded.scheme}, here {base.scheme})")
    if recorded.arch_digest != base.arch_digest:
        return Comparison(Verdict.MISMATCH, f"another architecture: {_arch_difference(recorded.arch, base.arch)}")
    strangers = (recorded.anchors | recorded.matrices).keys() ^ (base.anchors | base.matrices).keys()
    if strangers:
        return Comparison(Verdict.MISMATCH, f"{len(strangers)} tensors are in one model only, such as {min(strangers)}")
    if recorded.sample_digest == base.sample_digest:
        return Comparison(Verdict.EXACT, f"all {len(base.anchors) + len(base.matrices)} sampled tensors are equal")

    other_anchors = _differing(recorded.anchors, base.anchors)
    if other_anchors:
        return Comparison(
            Verdict.MISMATCH,
            f"{len(other_anchors)} of {len(base.anchors)} norms and biases differ, such as {other_anchors[0]}: another training "
            "of the same architecture",
        )
    return _judge_matrices(recorded, base)


def verdict(recorded: Mapping[str, Any] | None, base: Mapping[str, Any]) -> Comparison:
    """Judge two fingerprints as JSON values, as luthier.json and the registry keep them; see `compare`. Loads no torch.

    Raises: ModelError if one of them is no fingerprint.
    """
    return compare(_parsed(recorded, "the recorded base") if recorded else None, _parsed(base, "this base"))


def _parsed(values: Mapping[str, Any], whose: str) -> Fingerprint:
    try:
        return Fingerprint.model_validate(values)
    except ValidationError as error:
        raise ModelError(f"the fingerprint of {whose} is damaged: {error}. Take it again from the model.") from error


def full_digest(path: Path) -> str:
    """Return the sha256 over every tensor of a model folder (or one safetensors file): names, dtypes, shapes and all bytes.

    How the tensors are spread over files makes no difference. Every byte is read (0.5 to 1.5 GB/s per core): keep the result.
    Raises: ModelError if a file is truncated, or two files hold the same tensor.
    """
    digests: dict[str, str] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        entries = read_entries(file)
        if not entries:
            continue
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            for entry in entries:
                if entry.name in digests:
                    raise ModelError(f"Tensor {entry.name} is stored twice below {path}; which one counts is not defined.")
                with view[entry.begin : entry.end] as raw:
                    content = hashlib.sha256(raw).hexdigest()
                digests[entry.name] = _digest(entry.dtype, str(entry.shape), content)
    return _digest_all(digests)


# How a tensor becomes bytes


def _bytes(flat: "torch.Tensor") -> bytes:
    """The values of a flat tensor as little-endian bfloat16; those that float16 cannot hold as well count as zero."""
    import torch

    rounded = flat.to(device="cpu", dtype=torch.bfloat16)
    return _raw(torch.where(rounded.abs() < FLOAT16_NORMAL, torch.zeros_like(rounded), rounded))


def _raw(bfloat16: "torch.Tensor") -> bytes:
    import torch

    return bfloat16.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


def _sample(tensor: "torch.Tensor") -> tuple[bytes, bytes]:
    """Return (start, middle and end slices; the sketch) of a matrix, in one transfer from its device."""
    import torch

    flat = tensor.reshape(-1)
    count = flat.numel()
    middle = max(0, (count - SLICE) // 2)
    end = max(0, count - SLICE)
    # A whole number of runs from the start, so that the run never crosses the edge of a quantiser's block.
    run = (count // 2) // SKETCH_VALUES * SKETCH_VALUES
    parts = [flat[:SLICE], flat[middle : middle + SLICE], flat[end:], flat[run : run + SKETCH_VALUES]]
    rounded = torch.cat(parts).to(device="cpu", dtype=torch.bfloat16)
    cut = rounded.numel() - parts[-1].numel()
    return _bytes(rounded[:cut]), _raw(rounded[cut:])


def _fault(tensor: "torch.Tensor") -> str:
    if tensor.is_meta:
        return "is on the meta device and has no values; load the weights first"
    if not tensor.is_floating_point():
        return f"is {tensor.dtype}, packed or integer storage; pass it dequantised"
    return "was given twice"


def _drop_tied_head(matrices: dict[str, str], values: dict[str, bytes], config: Mapping[str, Any]) -> None:
    """Forget an output head that is the embedding under a second name (state_dict() lists it, named_parameters() does not)."""
    if not config.get("tie_word_embeddings"):
        return
    embedded = {digest for name, digest in matrices.items() if _EMBEDDING.search(name)}
    for name in [name for name in matrices if name.endswith("lm_head.weight") and matrices[name] in embedded]:
        del matrices[name], values[name]


def _digest(*parts: str | bytes) -> str:
    """sha256 of the parts, each preceded by its length so that no two lists of parts run together."""
    hasher = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "little"))
        hasher.update(raw)
    return hasher.hexdigest()


def _digest_all(digests: Mapping[str, str]) -> str:
    return _digest(*(part for name in sorted(digests) for part in (name, digests[name])))


# The architecture


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The whitelisted keys that are set, as plain JSON values."""
    kept: dict[str, Any] = {}
    for key in sorted(ARCH_KEYS & set(config)):
        value = config[key]
        if isinstance(value, Mapping) and key == "text_config":
            value = _architecture(value)
        if value is not None:
            kept[key] = json.loads(json.dumps(value))
    return kept


def _declared_quantisation(config: Mapping[str, Any]) -> str | None:
    declared = config.get("quantization_config")
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, Mapping) else getattr(declared, "quant_method", None)
    return str(getattr(method, "value", method))


def _arch_difference(recorded: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    keys = [key for key in sorted(recorded.keys() | base.keys()) if recorded.get(key) != base.get(key)]
    told = [f"{key} was {recorded.get(key)!r}, is {base.get(key)!r}" for key in keys[:3]]
    return "; ".join(told) + (f"; and {len(keys) - 3} more" if len(keys) > 3 else "")


# The judgement of matrices whose samples differ


def _judge_matrices(recorded: Fingerprint, base: Fingerprint) -> Comparison:
    """Decide between a quantised copy, its original and another model, the norms being equal."""
    differing = _differing(recorded.matrices, base.matrices)
    share = f"{len(differing)} of {len(base.anchors) + len(base.matrices)} sampled tensors differ"
    shown = [name for name in differing if name in base.sketch and name in recorded.sketch]
    forward = _roundings(shown, recorded, base)
    if forward:
        wrong = _most_wrong(forward)
        if not wrong:
            return Comparison(
                Verdict.QUANTISED_OF,
                f"the norms agree and the sampled values of the {len(shown)} differing tensors are the recorded ones, quantised "
                f"to {_bits(forward)}",
            )
        fault = f"the norms agree and {len(shown)} tensors are quantised, but {wrong} the recorded ones rounded"
        refused = Comparison(Verdict.MISMATCH, f"{fault}: a quantised copy of a fine-tuned or merged base")
    else:
        refused = Comparison(Verdict.MISMATCH, f"the norms agree but {share}: a fine-tune or merged copy of the base")
    if base.quantisation is not None and base.quantisation.lower() not in ROUNDING_METHODS:
        return Comparison(
            Verdict.DECLARED,
            f"the norms agree but {share}; the base declares {base.quantisation}, which need not round to the nearest level, "
            "so its weights cannot be checked",
        )
    # The other way round: an adapter trained on a quantised copy, loaded on the original.
    backward = _roundings(shown, base, recorded)
    if backward and not _most_wrong(backward) and median(item.spread for item in backward) >= FILLED:
        return Comparison(
            Verdict.QUANTISED_OF,
            f"the recorded base was a quantised copy of this one: the norms agree and {len(shown)} tensors round to it",
        )
    return refused


def _bits(evidence: list[Rounding]) -> str:
    kinds = {item.is_eight_bit for item in evidence}
    return " and ".join("8 bits" if eight else "5 bits or fewer" for eight in sorted(kinds))


def _roundings(names: list[str], original: Fingerprint, rounded: Fingerprint) -> list[Rounding]:
    """Hold the sketches of `names` against each other; empty as soon as one of them is no rounded copy."""
    found: list[Rounding] = []
    for name in names:
        item = compare_sketches(name, original.sketch[name], rounded.sketch[name])
        if not item.is_rounded:
            return []
        found.append(item)
    return found


def _differing(recorded: Mapping[str, str], base: Mapping[str, str]) -> list[str]:
    return [name for name in sorted(base) if recorded[name] != base[name]]


def _most_wrong(evidence: list[Rounding]) -> str:
    """Say in words which kind of module has too many values in wrong cells, or "" if none has.

    By kind ("q_proj.weight" over all layers), because an adapter on two projections of seven changes only those.
    """
    wrong: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for item in evidence:
        for kind in (item.kind, "all matrices"):
            wrong[kind] += item.num_wrong
            total[kind] += item.num_values
    rates = {kind: wrong[kind] / total[kind] for kind in total if wrong[kind] > _explained(total[kind])}
    worst = max(rates, key=lambda kind: rates[kind], default="")
    return f"{rates[worst]:.1%} of the values in {worst} are not" if worst else ""


def _explained(num_values: int) -> float:
    """How many values in wrong cells rounding may leave among so many: the mean of a Poisson count and four deviations."""
    mean = WRONG_BY_ROUNDING * num_values
    return mean + 4 * mean**0.5 + 2
