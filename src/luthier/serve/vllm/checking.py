"""check_for_vllm(): what of an adapter vLLM would serve wrongly, in words. Nothing is served that has a reason against it.

vLLM reads an adapter by its own rules (0.32, vllm/lora): it asks neither which base the numbers belong to nor what `peft_type`
is, skips keys that fit no layer without a word, copies matrices that are too small into a corner of the right place, and scales
by the rank that the configuration tells. What it refuses by itself is refused here too, where the reason can be told.

Who is served is found out once, by whoever starts vLLM (`Served.of_folder`), and handed to vLLM's process as a file: the
fingerprint is taken with the transformers that adapters are trained with, which need not be the one in vLLM's environment.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import LuthierError, ModelError
from luthier.core.methods import LOFTQ
from luthier.core.names import pattern_value
from luthier.formats.fingerprint import Verdict, verdict

if TYPE_CHECKING:
    from luthier.formats.folder import AdapterFolder

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

PREFIX = "base_model.model."
HALVES = {".lora_A.weight": "A", ".lora_B.weight": "B"}
SHOWN = 3


@dataclass(frozen=True)
class Served:
    """The base that vLLM serves: its fingerprint as JSON, and (outputs, inputs) of its linear layers but the head, by path."""

    fingerprint: Mapping[str, Any]
    layers: Mapping[str, tuple[int, int]]

    @classmethod
    def of_folder(cls, folder: str | Path) -> Self:
        """Describe the base model in a folder, reading a sample of each weight. Raises: ModelError."""
        return cls(*_described(Path(folder)))

    @classmethod
    def read(cls, file: str | Path) -> Self:
        """Return what `write` wrote. Raises: ModelError if that is not what is there."""
        try:
            told = json.loads(Path(file).read_bytes())
            return cls(told["fingerprint"], {path: (int(rows), int(columns)) for path, (rows, columns) in told["layers"].items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file} does not describe a served base: {error}") from error

    def write(self, file: str | Path) -> None:
        """Write it for vLLM's process."""
        told = {"fingerprint": dict(self.fingerprint), "layers": {path: list(shape) for path, shape in self.layers.items()}}
        Path(file).write_text(json.dumps(told))


def check_for_vllm(folder: str | Path, base: Served, max_rank: int, *, trained_on: Mapping[str, Any] | None = None) -> list[str]:
    """Return why vLLM must not serve an adapter on `base`, each reason by itself; none where it serves it right.

    `trained_on` is the fingerprint in the registry, for folders that bring none. A base that nobody recorded is no reason, as for
    `load_adapter`. Raises: AdapterFormatError for a folder that is no sound adapter, ModelError for a damaged fingerprint.
    """
    from luthier.formats.folder import read_adapter

    read = read_adapter(folder)
    judged = verdict(read.note.get("base") or trained_on, base.fingerprint)
    reasons = [f"it was trained on another base: {judged.reason}"] if judged.verdict is Verdict.MISMATCH else []
    reasons += _methods(read, is_exact=judged.verdict is Verdict.EXACT)
    reasons += _tensors(read, base)
    return reasons + _ranks(read, max_rank)


def size_for(ranks: Iterator[int]) -> int:
    """Return the smallest --max-lora-rank that holds these ranks; those that no size holds are left out."""
    largest = max((rank for rank in ranks if rank <= RANKS[-1]), default=1)
    return next(size for size in RANKS if size >= largest)


def _methods(read: "AdapterFolder", *, is_exact: bool) -> list[str]:
    """What its configuration asks for that vLLM does not do."""
    config = read.config
    if isinstance(config, AdaLoraConfig):
        return ["it is an AdaLoRA adapter, which vLLM takes for another kind; `luthier.formats.plain_lora` makes it a plain one"]
    used = {
        "use_dora (DoRA's magnitudes)": config.use_dora,
        f"bias={config.bias!r} (trained biases)": config.bias != "none",
        "lora_bias": config.lora_bias,
        f"modules_to_save={config.modules_to_save} (modules saved whole)": config.modules_to_save,
        "trainable_token_indices (rows of tokens)": config.trainable_token_indices,
        f"target_parameters={config.target_parameters} (parameters that belong to no layer)": config.target_parameters,
    }
    reasons = [f"it uses {name}, which vLLM does not serve" for name, value in used.items() if value]
    is_fitted = bool(read.minus) or LOFTQ in read.note.get("recipe", {})
    if is_fitted and not is_exact:
        reasons.append(f"it was made by init '{LOFTQ}', whose pairs fit only the base in 4 bits that they were made for")
    return reasons


def _tensors(read: "AdapterFolder", base: Served) -> list[str]:
    """What its tensors are that vLLM would skip or put into the wrong place."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    strange: list[str] = []
    for key, tensor in read.tensors.items():
        side = next((side for ending, side in HALVES.items() if key.endswith(ending)), None)
        if side is None:
            strange.append(key)
        else:
            path = key.removeprefix(PREFIX).rpartition(f".lora_{side}.")[0]
            halves.setdefault(path, {})[side] = tuple(tensor.shape)
    tables = [key for key in strange if ".lora_embedding_" in key] + [path for path in halves if path.endswith("lm_head")]
    others = [key for key in strange if key not in tables]
    unknown = [path for path in halves if path not in base.layers and path not in tables]
    misfits = [fault for path in halves if path in base.layers for fault in _faults(path, halves[path], base, read.config)]
    reasons = [
        _listed("it adapts the embeddings or the output head, which luthier does not trust to vLLM", tables),
        _listed("vLLM knows no such tensors", others),
        _listed("these layers are not in this base, and vLLM would leave them out without a word", unknown),
        _listed("its tensors do not fit this base", misfits),
    ]
    if not read.tensors:
        reasons.append("it has no tensors: vLLM would answer as the base does")
    return [reason for reason in reasons if reason]


def _faults(path: str, pair: dict[str, tuple[int, ...]], base: Served, config: LoraConfig) -> Iterator[str]:
    if missing := {"A", "B"} - pair.keys():
        yield f"{path} has no lora_{missing.pop()}"
        return
    rows, columns = base.layers[path]
    r = int(pattern_value(config.rank_pattern, path, config.r))
    for side, needed in (("A", (r, columns)), ("B", (rows, r))):
        if pair[side] != needed:
            yield f"{path}.lora_{side} is {pair[side]}, needs {needed}"


def _ranks(read: "AdapterFolder", max_rank: int) -> list[str]:
    rank = max((tensor.shape[0] for key, tensor in read.tensors.items() if key.endswith(".lora_A.weight")), default=0)
    if rank <= max_rank:
        return []
    if rank > RANKS[-1]:
        return [f"its rank is {rank}, and vLLM has no room for more than {RANKS[-1]}"]
    needed = size_for(iter([rank]))
    return [f"its rank is {rank}, and vLLM was started for at most {max_rank}; start it with max_lora_rank={needed}"]


def _listed(reason: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{reason} ({len(names)}): {', '.join(names[:SHOWN])}{rest}"


def _described(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    import torch
    from transformers.pytorch_utils import Conv1D

    from luthier.adapt.state import base_parameters
    from luthier.formats.adapters import fingerprint_of
    from luthier.formats.fingerprint import fingerprint
    from luthier.models.blueprint import meta_model, read_config
    from luthier.models.checkpoint import Checkpoint

    config = read_config(str(folder))
    model = meta_model(config, torch.bfloat16)
    head = model.get_output_embeddings()
    layers: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            layers[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            layers[path] = (module.weight.shape[1], module.weight.shape[0])
    checkpoint = Checkpoint(folder)

    def weights() -> "Iterator[tuple[str, torch.Tensor]]":
        for name, _ in base_parameters(model):
            tensor = checkpoint.find(name)
            if tensor is None:
                raise KeyError(name)
            yield name, tensor

    try:
        return fingerprint(weights(), config.to_dict()).model_dump(), layers
    except KeyError:  # weights that are stored otherwise than they are used (stacked experts, 4 bits) meet in the model itself
        from luthier.models.load import load_model

        return fingerprint_of(load_model(str(folder), device="cpu").model).model_dump(), layers


if __name__ == "__main__":
    try:
        Served.of_folder(sys.argv[1]).write(sys.argv[2])
    except LuthierError as error:
        sys.exit(str(error))
