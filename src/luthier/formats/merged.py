"""save_merged() and save_packed(): write a whole checkpoint, with the active adapters folded in, or of a base in 4 bits.

Plain transformers reads the first, and with bitsandbytes the second.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapt.merging import merge, unmerge
from luthier.adapt.packing import dense_state_dict, has_packed_layers
from luthier.adapt.state import adapter_prefixes, find_roster, roster_of
from luthier.core.atomic import new_folder
from luthier.core.errors import AdapterStateError


def save_merged(model: nn.Module, path: str | Path, *, tokenizer: Any = None) -> Path:
    """Write `model` with its active adapters merged to the folder `path`, and leave `model` as it was.

    Weights that the merge gave two values (a tied embedding that only one side's adapter changed) are written as two, and
    the configuration says that they are no longer tied. Weights stored in 4 bits are all written dense.
    Raises: AdapterStateError, StorageError.
    """
    write = getattr(type(model), "save_pretrained", None)  # the class's own: attaching put a guard on the instance
    if write is None:
        raise AdapterStateError(f"a {type(model).__name__} has no save_pretrained; merge(model) and save its state_dict yourself")
    was_merged = roster_of(model).is_merged
    merge(model)
    config: Any = model.config
    tied = getattr(config, "tie_word_embeddings", None)
    declared = vars(config).pop("quantization_config", None) if has_packed_layers(model) else None
    try:
        if tied and not _is_tied(model):
            config.tie_word_embeddings = False
        inside = adapter_prefixes(model)
        weights = {name: tensor for name, tensor in dense_state_dict(model).items() if not name.startswith(inside)}
        with new_folder(Path(path)) as folder:
            write(model, folder, state_dict=weights)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        if tied is not None:
            config.tie_word_embeddings = tied
        if declared is not None:
            config.quantization_config = declared
        if not was_merged:
            unmerge(model)
    return Path(path)


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


def merge_difference(model: nn.Module, input_ids: Tensor) -> MergeDifference:
    """Compare logits before and after merging on some token ids (B, T); the model is as before afterwards.

    Raises: AdapterStateError if it is merged already, since there would be nothing to compare with.
    """
    if roster_of(model).is_merged:
        raise AdapterStateError("the adapters are merged already; unmerge(model) first")
    with torch.no_grad():
        unmerged = model(input_ids).logits.float()
        merge(model)
        try:
            merged = model(input_ids).logits.float()
        finally:
            unmerge(model)
    relative = float((merged - unmerged).abs().max() / unmerged.abs().max())
    return MergeDifference(relative, float((merged.argmax(-1) == unmerged.argmax(-1)).float().mean()))
