"""compare_adapters(): how much the directions of two adapters have in common, layer by layer.

The measure is the LoRA paper's (Hu et al. 2021, arXiv:2106.09685, section 7.2): phi(i, j) = |U1_i^T U2_j|^2 / min(i, j), for the
first i singular directions of one update and the first j of the other. It is 1 where one space lies in the other. Two random
spaces in D dimensions have about max(i, j) / D, so that is what a value has to be held against.
"""

from dataclasses import asdict, dataclass
from typing import Any

from luthier.core.errors import AdapterMismatchError
from luthier.core.spectrum import factored_cosine, factored_svd, numerical_rank, subspace_overlap
from luthier.formats.folder import AdapterFolder
from luthier.formats.pairs import StoredPair, stored_pairs

Grid = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerSimilarity:
    """One layer that both adapters have. A grid's entry [i-1][j-1] is phi(i, j); i counts the first adapter's directions."""

    path: str
    shape: tuple[int, int]
    ranks: tuple[int, int]
    """The directions that each update really has; grids are of this size, and empty where one is zero."""
    left: Grid
    """Of the left singular vectors: directions of the layer's output."""
    right: Grid
    """Of the right ones: directions of its input."""
    cosine: float
    """Of the two updates as vectors of numbers: 1 the same but for size, -1 opposite."""

    @property
    def by_chance(self) -> tuple[float, float]:
        """What phi of all directions would be for random ones, left and right."""
        out_features, in_features = self.shape
        return min(1.0, max(self.ranks) / out_features), min(1.0, max(self.ranks) / in_features)


@dataclass(frozen=True)
class Similarity:
    """All layers that two adapters have in common, and the names of those that only one has."""

    layers: tuple[LayerSimilarity, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        layers = [asdict(layer) | {"by_chance": layer.by_chance} for layer in self.layers]
        return {"layers": layers, "only_first": self.only_first, "only_second": self.only_second}


def compare_adapters(first: AdapterFolder, second: AdapterFolder) -> Similarity:
    """Compare two adapters on the layers that both have. Ranks may differ.

    Raises: AdapterMismatchError if they have no layer in common, or updates of other shapes (all listed).
    """
    ours, theirs = ({pair.path: pair for pair in stored_pairs(folder)} for folder in (first, second))
    common = [path for path in ours if path in theirs]
    if not common:
        raise AdapterMismatchError(f"{first.path} and {second.path} have no adapted layer in common; nothing to compare")
    shapes = {path: (_shape(ours[path]), _shape(theirs[path])) for path in common}
    if odd := [f"  {path} is {one}, and {other}" for path, (one, other) in shapes.items() if one != other]:
        raise AdapterMismatchError(
            f"{first.path} and {second.path} are for bases of other sizes ({len(odd)} of {len(common)} layers differ):\n"
            + "\n".join(odd[:20])
        )
    return Similarity(
        tuple(compare_layer(ours[path], theirs[path]) for path in common),
        tuple(path for path in ours if path not in theirs),
        tuple(path for path in theirs if path not in ours),
    )


def compare_layer(first: StoredPair, second: StoredPair) -> LayerSimilarity:
    """Compare two updates of one layer."""
    (A1, B1), (A2, B2) = first.matrices(), second.matrices()
    U1, S1, Vt1 = factored_svd(A1, B1, first.scaling)
    U2, S2, Vt2 = factored_svd(A2, B2, second.scaling)
    m, n = numerical_rank(S1), numerical_rank(S2)
    left, right = subspace_overlap(U1[:, :m], U2[:, :n]), subspace_overlap(Vt1[:m].T, Vt2[:n].T)
    grids = [tuple(tuple(row) for row in grid.tolist()) if m and n else () for grid in (left, right)]
    return LayerSimilarity(first.path, _shape(first), (m, n), grids[0], grids[1], factored_cosine((A1, B1), (A2, B2)))


def _shape(pair: StoredPair) -> tuple[int, int]:
    A_RI, B_OR = pair.matrices()
    return B_OR.shape[0], A_RI.shape[1]
