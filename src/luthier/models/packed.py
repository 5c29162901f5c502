"""A checkpoint straight into 4 bits: a weight is read, quantised and let go before the next one is read.

transformers builds the model, knows what its checkpoints call their tensors, and asks for them one by one; a quantizer of ours
takes the weights of linear layers from it. A folder that holds 4-bit weights already (`save_pretrained` of such a model, or
bitsandbytes' NF4) gives them as they are. Files are read, not mapped into memory: a mapped file counts until it is closed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from luthier.core.errors import ConfigError, LuthierError, ModelError
from luthier.layers.packable import Packing, declare_packed, packing_of, split_linears
from luthier.layers.packed import PackedLinear, pack_linear
from luthier.models.blueprint import meta_model
from luthier.models.weights import weight_files
from luthier.quant.keys import STATE, from_keys
from luthier.quant.nf4 import NF4Weight, quantize_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

METHOD = "luthier_nf4"
CPU = torch.device("cpu")


def declared_packing(config: "PreTrainedConfig") -> dict[str, Any] | None:
    """Return the configuration's own word on its 4-bit weights; None if they are floats.

    Raises: ModelError if they are quantised in a way that is not NF4.
    """
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    words = declared if isinstance(declared, dict) else declared.to_dict()
    method, kind = words.get("quant_method"), words.get("bnb_4bit_quant_type")
    if words.get("load_in_4bit") and kind == "nf4":
        return words
    told = f"{getattr(method, 'value', method)} {kind if words.get('load_in_4bit') else ''}".strip()
    raise ModelError(f"the model is quantised already ({told}), which luthier does not read; use the original, or NF4")


def read_packed(path: Path, config: "PreTrainedConfig", dtype: torch.dtype) -> tuple["PreTrainedModel", dict[str, Any], Packing]:
    """Return the model in the folder `path` with its linear layers in 4 bits, transformers' loading report, and ours.

    Embeddings, norms, biases and the output head are in `dtype`. Of a folder that holds floats the result is, bit for bit,
    `quantize_linears` of the loaded model. Raises: ConfigError (weights that cannot be put into 4 bits, all of them), ModelError.
    """
    declared = declared_packing(config)
    if declared is not None:
        del config.quantization_config
    blueprint = meta_model(config, dtype)
    layers, left_out = split_linears(blueprint) if declared is None else ({}, {})
    found, report = type(blueprint).from_pretrained(
        None,
        config=blueprint.config,
        state_dict=_stored(path),
        quantization_config=NF4Config(frozenset(layers) if declared is None else None),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    model: Any = found
    quantizer: NF4Quantizer = model.hf_quantizer
    quantizer.leave(model)
    if quantizer.faults:
        raise ConfigError(
            f"{len(quantizer.faults)} layers cannot be put into 4 bits:\n" + "\n".join(quantizer.faults), quantizer.faults
        )
    report["mismatched_keys"] |= quantizer.mismatched
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    if not packed:
        raise ConfigError(f"no linear layer of {path} can be put into 4 bits: {left_out or 'it has none'}")
    if declared is None:
        declare_packed(model, list(left_out), True, dtype)
    else:
        model.config.quantization_config = declared
    # What transformers does where it is given a folder instead of tensors.
    model.name_or_path = model.config.name_or_path = str(path)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, report, packing_of(packed, left_out)


class StoredPacked:
    """A 4-bit weight of a file, where transformers expects a tensor that it slices and casts."""

    def __init__(self, slices: dict[str, Any]):
        self.slices = slices

    def __getitem__(self, index: Any) -> "StoredPacked":
        return self

    def to(self, device: Any = None, dtype: Any = None) -> "StoredPacked":
        return self

    def read(self) -> NF4Weight:
        return from_keys({key: each[...] for key, each in self.slices.items()})


def _stored(path: Path) -> dict[str, Any]:
    """Return name -> what reads that tensor, of every tensor in the folder."""
    slices: dict[str, Any] = {}
    for file in weight_files(path):
        opened: Any = safe_open(file, "pt", backend="pread")
        slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  it is no dictionary
    for name in [name.removesuffix(f".{STATE}") for name in slices if name.endswith(f".{STATE}")]:
        parts = {key.removeprefix(f"{name}."): slices.pop(key) for key in list(slices) if key.startswith(f"{name}.")}
        slices[name] = StoredPacked({"": slices.pop(name)} | parts if name in slices else parts)
    return slices


class NF4Config(QuantizationConfigMixin):
    """What `from_pretrained` is told: the paths of the layers to put into 4 bits, or None where the files hold 4-bit weights."""

    def __init__(self, paths: frozenset[str] | None):
        self.quant_method, self.paths = METHOD, paths


@register_quantizer(METHOD)
class NF4Quantizer(HfQuantizer):
    """Puts the weights that `from_pretrained` reads into 4 bits, or takes those that are there already."""

    is_trainable = True

    def __init__(self, quantization_config: NF4Config, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.paths, self.faults = quantization_config.paths, list[str]()
        self.mismatched: set[tuple[str, Any, Any]] = set()

    def is_serializable(self) -> bool:
        return True

    def param_needs_quantization(self, model: "PreTrainedModel", param_name: str, **kwargs: Any) -> bool:
        """Return whether what is read for this parameter is given to `pack`."""
        path, _, key = param_name.rpartition(".")
        return key == "weight" and (self.paths is None or path in self.paths)

    def get_quantize_ops(self) -> "Pack":
        return Pack(self)

    def pack(self, model: nn.Module, name: str, value: "Tensor | StoredPacked") -> Tensor:
        """Return what becomes of the weight `name`; its layer is in 4 bits then. Faults are collected, all of them."""
        path = name.rpartition(".")[0]
        layer = model.get_submodule(path)
        if not isinstance(value, StoredPacked) and self.paths is None:
            return value  # one that the files hold as floats
        own = layer.get_parameter("weight")
        try:
            if not isinstance(layer, nn.Linear):
                raise ModelError(f"a {type(layer).__name__} has no place for the 4-bit weight in the file")
            made = value.read().to(CPU, own.dtype) if isinstance(value, StoredPacked) else quantize_nf4(value)
        except LuthierError as error:
            self.faults.append(f"  {path}: {error}")
            return own
        if made.shape != own.shape:
            self.mismatched.add((name, made.shape, own.shape))
            return own
        pack_linear(layer, made)
        return layer.weight

    def leave(self, model: Any) -> None:
        """Take from the model what says that a quantizer of transformers' is at work: its layers need none."""
        self.remove_quantization_config(model)
        del model.is_quantized
        for module in model.modules():
            vars(getattr(module, "config", None) or module).pop("_is_quantized", None)


class Pack(ConversionOps):
    """The step of transformers' loading in which a weight goes into 4 bits."""

    def __init__(self, quantizer: NF4Quantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Any]:
        """Return name -> what is put there, of the tensors that were read for one parameter."""
        found: Iterable[tuple[str, Any]] = list(input_dict.items())
        input_dict.clear()  # the float weights go one by one
        return {name: self.quantizer.pack(model, name, value[0] if isinstance(value, list) else value) for name, value in found}
