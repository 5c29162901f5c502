"""stored_pairs(): the pairs in an adapter folder as two matrices and a scaling each, whatever kind of layer they are for.

The update of every kind is one matrix, dW = scaling * B A: of a linear layer and of an embedding as it stands, (O, I), of a
convolution with its window flattened, (O, I K...), of AdaLoRA with lora_E folded into A. No model is needed for that.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from luthier.core.adalora import adalora_scaling
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import AdapterFormatError
from luthier.core.lora import expert_factors, lora_scaling
from luthier.core.names import pattern_value
from luthier.formats.folder import AdapterFolder
from luthier.formats.keys import PREFIX, canonical_keys, parameter_sizes

# Of lora_A and lora_B: Linear and convolutions, embeddings, AdaLoRA.
_SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora_A", ".lora_B"),
)
_INSIDE_ATTENTION = ".base_layer.out_proj"


@dataclass(frozen=True)
class StoredPair:
    """One pair as it lies in the file.

    `path` is the module's; `owner` the one that targets and patterns mean, which is the attention's where the pair is that of an
    output projection inside nn.MultiheadAttention. `keys` are those of lora_A and lora_B on disk, as PEFT 0.21 writes them.
    """

    path: str
    owner: str
    kind: str
    """linear, embedding, convolution, attention (the input projections of one) or expert (one of those that share a tensor)"""
    scaling: float
    lora_A: Tensor
    lora_B: Tensor
    keys: tuple[str, str]
    lora_E: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def r(self) -> int:
        return len(self.lora_A)

    @property
    def groups(self) -> int:
        """Of a grouped convolution: its lora_B (O, R / groups, 1...) gives the ranks of a group to that group's outputs only."""
        return self.r // self.lora_B.shape[1] if self.lora_B.ndim > 2 else 1

    @property
    def parameter(self) -> str:
        """The name of the base's parameter that the update is added to."""
        return f"{self.path}.{'in_proj_weight' if self.kind == 'attention' else 'weight'}"

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return (A (R, I), B (O, R)) in float64; the update is scaling * B A."""
        A_RI, B_OR = self.lora_A.double().flatten(1), self.lora_B.double().flatten(1)
        if self.lora_E is not None:
            A_RI = A_RI * self.lora_E.double()
        if self.groups > 1:
            B_OR = torch.block_diag(*B_OR.chunk(self.groups))
        return A_RI, B_OR


def stored_pairs(folder: AdapterFolder) -> list[StoredPair]:
    """Return every pair of an adapter folder by its path, layer 10 after layer 2.

    Raises: AdapterFormatError naming every lora_A without its lora_B, the other way round, and every two that share no rank.
    """
    tensors = canonical_tensors(folder)
    found = list(_found(tensors))
    paired = {key for keys in found for key in keys}
    ends = tuple(suffix for suffixes in _SUFFIXES for suffix in suffixes)
    faults = [f"{key} has no other half" for key in tensors if key.endswith(ends) and key not in paired]
    pairs = [pair for key_A, key_B in found for pair in _pairs(folder.config, tensors, key_A, key_B)]
    for pair in pairs:
        columns = pair.lora_B.shape[1]
        if pair.r % columns if columns and pair.lora_B.ndim > 2 else pair.r != columns:
            shapes = f"lora_A {tuple(pair.lora_A.shape)} and lora_B {tuple(pair.lora_B.shape)}"
            faults.append(f"{pair.path}: {shapes} do not share a rank")
    if faults:
        raise AdapterFormatError(
            f"{folder.path}: {len(faults)} pairs are damaged:\n" + "\n".join(f"  {it}" for it in faults[:20])
        )
    return sorted(pairs, key=lambda pair: [(len(part), part) if part.isdigit() else (0, part) for part in pair.path.split(".")])


def canonical_tensors(folder: AdapterFolder) -> dict[str, Tensor]:
    """Return the folder's tensors under the names that PEFT 0.21 gives them."""
    return {key: folder.tensors[found] for found, key in canonical_keys(folder.tensors).items()}


def _found(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    for key in tensors:
        for end_A, end_B in _SUFFIXES:
            other = key.removesuffix(end_A) + end_B
            if key.endswith(end_A) and other in tensors:
                yield key, other


def _pairs(config: LoraConfig, tensors: dict[str, Tensor], key_A: str, key_B: str) -> list[StoredPair]:
    """Return the pair of a layer, or those of the experts of a parameter, whose path ends in the expert's number."""
    pair = _pair(config, tensors, key_A, key_B)
    sizes = parameter_sizes(config, pair.path)
    if not sizes:
        return [pair]
    (r, alpha), *others = sizes
    num_experts, rest = divmod(pair.r, r)
    if others or rest or pair.lora_B.ndim != 2 or pair.lora_B.shape[1] != pair.r:
        return []  # the file does not say which of its module's parameters this is, and so neither its rank
    scaling = lora_scaling(r, alpha, config.use_rslora)
    if num_experts == 1:
        return [replace(pair, scaling=scaling)]  # of a matrix, such as a linear layer's weight
    lefts, rights = expert_factors(pair.lora_A, pair.lora_B, num_experts)
    return [
        replace(pair, path=f"{pair.path}.{expert}", kind="expert", scaling=scaling, lora_A=right, lora_B=left)
        for expert, (left, right) in enumerate(zip(lefts, rights, strict=True))
    ]


def _pair(config: LoraConfig, tensors: dict[str, Tensor], key_A: str, key_B: str) -> StoredPair:
    lora_A, lora_B = tensors[key_A], tensors[key_B]
    end = next(end for end, _ in _SUFFIXES if key_A.endswith(end))
    path = key_A.removesuffix(end).removeprefix(PREFIX)
    owner = path.removesuffix(_INSIDE_ATTENTION)
    kind = "embedding" if end == ".lora_embedding_A" else "convolution" if lora_A.ndim > 2 else "linear"
    if f"{PREFIX}{path}{_INSIDE_ATTENTION}{end}" in tensors:
        kind = "attention"
    if isinstance(config, AdaLoraConfig):
        scaling = adalora_scaling(config.init_r, config.lora_alpha)
    else:
        alpha = pattern_value(config.alpha_pattern, owner, config.lora_alpha)
        scaling = lora_scaling(len(lora_A), alpha, config.use_rslora)
    return StoredPair(
        path=owner if path == owner else f"{owner}.out_proj",
        owner=owner,
        kind=kind,
        scaling=scaling,
        lora_A=lora_A,
        lora_B=lora_B,
        keys=(key_A, key_B),
        lora_E=tensors.get(f"{PREFIX}{path}.lora_E"),
        magnitude=tensors.get(f"{PREFIX}{path}.lora_magnitude_vector"),
    )
