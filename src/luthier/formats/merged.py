"""save_merged() and save_packed(): write a whole checkpoint, with the active adapters folded in, or of a base in 4 bits.

Plain transformers reads a dense one, and with bitsandbytes one in 4 bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapt.merging import merge, unmerge
from luthier.adapt.packing import dense_state_dict, has_packed_layers, packable, packed_state_dict
from luthier.adapt.state import adapter_prefixes, find_roster, roster_of
from luthier.core.atomic import new_folder
from luthier.core.errors import AdapterStateError, ConfigError, did_you_mean
from luthier.layers.packable import declare_packed
from luthier.ops.packed import PackedTensor, packed_parameter
from luthier.quant.nf4 import quantize_nf4

WRITTEN = ("dense", "nf4")
"""The ways in which a merged model's linear layers are written."""


def save_merged(model: nn.Module, path: str | Path, *, to: str = "dense", tokenizer: Any = None) -> Path:
    """Write `model` with its active adapters merged to the folder `path`, and leave `model` as it was.

    Weights that the merge gave two values (a tied embedding that only one side's adapter changed) are written as two, and
    the configuration says that they are no longer tied. Weights stored in 4 bits are all written dense, unless `to` is "nf4":
    then the linear layers that `quantize_linears` would choose are merged as dense ones and put into 4 bits, which may round the
    better part of an update away (`luthier.inspect.merge_survival` says how much).
    Raises: AdapterStateError, ConfigError (another word for `to`), StorageError.
    """
    check_written(to)
    write = getattr(type(model), "save_pretrained", None)  # the class's own: attaching put a guard on the instance
    if write is None:
        raise AdapterStateError(f"a {type(model).__name__} has no save_pretrained; merge(model) and save its state_dict yourself")
    config: Any = model.config
    tied, declared = getattr(config, "tie_word_embeddings", None), getattr(config, "quantization_config", None)
    with _merged(model, to) as left_out:
        try:
            if tied and not _is_tied(model):
                config.tie_word_embeddings = False
            if to == "nf4":
                declare_packed(model, left_out, True, next(iter(model.parameters())).dtype)
            elif has_packed_layers(model):
                vars(config).pop("quantization_config", None)
            state = packed_state_dict(model) if to == "nf4" else dense_state_dict(model)
            inside = adapter_prefixes(model)
            weights = {name: tensor for name, tensor in state.items() if not name.startswith(inside)}
            with new_folder(Path(path)) as folder:
                write(model, folder, state_dict=weights)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        finally:
            if tied is not None:
                config.tie_word_embeddings = tied
            vars(config).pop("quantization_config", None)
            if declared is not None:
                config.quantization_config = declared
    return Path(path)


def check_written(to: str) -> None:
    """Raise ConfigError unless a merged model can be written so."""
    if to not in WRITTEN:
        near = did_you_mean(to, WRITTEN)
        raise ConfigError(f"to={to!r} is unknown.{near} Write dense (in the dtype of the loaded model: dtype chooses it) or nf4.")


@contextmanager
def _merged(model: nn.Module, to: str) -> Iterator[list[str]]:
    """Merge `model`, for "nf4" with its linear layers in 4 bits, yield the paths of those that are not, and undo it all."""
    was_merged = roster_of(model).is_merged
    merge(model)
    dense: dict[str, nn.Parameter] = {}
    left_out: list[str] = []
    try:
        if to == "nf4":
            chosen, reasons = packable(model)
            left_out = list(reasons)
            for path in chosen:
                weight = model.get_parameter(f"{path}.weight")
                if not isinstance(weight, PackedTensor):
                    stored = packed_parameter(quantize_nf4(weight))
                    dense[path], model.get_submodule(path)._parameters["weight"] = weight, stored
        yield left_out
    finally:
        for path, weight in dense.items():
            model.get_submodule(path)._parameters["weight"] = weight
        if not was_merged:
            unmerge(model)


def save_packed(model: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a base whose linear layers are in 4 bits to the folder `path`, so that reading it takes no float copy of them.

    Keys and bytes are bitsandbytes'; `load_model` reads the folder back bit for bit. Raises: AdapterStateError (nothing is in 4
    bits, or adapters are attached, which go into folders of their own: `save_adapter`), StorageError.
    """
    if not has_packed_layers(model):
        raise AdapterStateError("no layer of this model is in 4 bits; quantize_linears(model) first, or use its save_pretrained")
    if find_roster(model) is not None:
        raise AdapterStateError("adapters are attached; save_adapter writes them, detach them before the base is saved")
    writer: Any = model
    with new_folder(Path(path)) as folder:
        writer.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(path)


def _is_tied(model: Any) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is None or embedding.weight is head.weight


@dataclass(frozen=True)
class MergeDifference:
    """How far a merged model's logits are from the unmerged one's: relative to the largest logit, and in the likeliest token."""

    relative: float
    same_top: float


def merge_difference(model: nn.Module, input_ids: Tensor, *, to: str = "dense") -> MergeDifference:
    """Compare logits before and after merging on some token ids (B, T), as `save_merged` would write the merged weights; the
    model is as before afterwards.

    Raises: AdapterStateError if it is merged already, since there would be nothing to compare with, ConfigError as above.
    """
    check_written(to)
    if roster_of(model).is_merged:
        raise AdapterStateError("the adapters are merged already; unmerge(model) first")
    with torch.no_grad():
        unmerged = model(input_ids).logits.float()
        with _merged(model, to):
            merged = model(input_ids).logits.float()
    relative = float((merged - unmerged).abs().max() / unmerged.abs().max())
    return MergeDifference(relative, float((merged.argmax(-1) == unmerged.argmax(-1)).float().mean()))
