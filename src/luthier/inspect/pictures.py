"""Pictures of an adapter: its spectra, the sizes of its updates over blocks and modules, and how it resembles another."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from luthier.core.figures import as_png, make_figure
from luthier.core.names import block_index
from luthier.inspect.similarity import Grid, LayerSimilarity, Similarity
from luthier.inspect.spectra import AdapterSpectra, LayerSpectrum

PURPOSE = "drawing an adapter"
COLUMNS = 4


def draw(spectra: AdapterSpectra, similarity: Similarity | None = None) -> dict[str, bytes]:
    """Return file name -> PNG of every picture there is something to draw for. Raises: MissingExtraError."""
    pictures = {}
    if spectra.layers:
        pictures["spectra.png"] = as_png(spectra_figure(spectra.layers))
        pictures["norms.png"] = as_png(norms_figure(spectra.layers))
    if similarity is not None and any(layer.left for layer in similarity.layers):
        pictures["similarity.png"] = as_png(similarity_figure(similarity.layers))
    return pictures


def spectra_figure(layers: Sequence[LayerSpectrum]) -> Any:
    """Singular values over their number, one panel for each kind of module, one line for each block."""
    kinds = _by_module(layers)
    rows = -(-len(kinds) // COLUMNS)
    figure = make_figure(PURPOSE, figsize=(3.2 * min(COLUMNS, len(kinds)), 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, min(COLUMNS, len(kinds)), squeeze=False, sharey=True).flat)
    lowest = min((value for layer in layers for value in layer.singular_values[: layer.numerical_rank]), default=1.0)
    for axes, (kind, found) in zip(panels, kinds.items(), strict=False):
        for index, layer in enumerate(found):
            values = layer.singular_values[: layer.numerical_rank]
            shade = index / max(1, len(found) - 1)
            axes.plot(
                range(1, len(values) + 1), values, color=(0.1 + 0.8 * shade, 0.3, 0.9 - 0.8 * shade), linewidth=1, marker="."
            )
        floors = [layer.base.noise_floor for layer in found if layer.base is not None and layer.base.noise_floor]
        if floors:
            axes.axhline(float(np.median(floors)), color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{kind} ({len(found)})", parse_math=False, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        axes.set_ylim(bottom=lowest / 2)
        axes.grid(alpha=0.3)
    for axes in panels[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("number of the singular value")
    figure.supylabel("singular value of dW")
    has_floor = any(layer.base is not None and layer.base.noise_floor for layer in layers)
    figure.suptitle(
        "first block blue, last red" + ("; dashed: what a bfloat16 merge rounds away" if has_floor else ""), fontsize=9
    )
    return figure


def norms_figure(layers: Sequence[LayerSpectrum]) -> Any:
    """Heat map of |dW| over blocks and kinds of modules, and of its share of the base's weight where that is known."""
    maps = {"|dW|": {layer.path: layer.delta_norm for layer in layers}}
    if any(layer.base is not None for layer in layers):
        maps["|change| / |W|"] = {layer.path: layer.base.share for layer in layers if layer.base is not None}
    kinds = list(_by_module(layers))
    blocks = sorted({_block(layer.path) for layer in layers})
    size = (max(3.5, 0.7 * len(kinds) + 1.5) * len(maps), max(2.5, 0.22 * len(blocks) + 1.5))
    figure = make_figure(PURPOSE, figsize=size, layout="constrained")
    for axes, (title, values) in zip(figure.subplots(1, len(maps), squeeze=False).flat, maps.items(), strict=True):
        sums = np.full((len(blocks), len(kinds)), np.nan)
        for path, value in values.items():
            place = blocks.index(_block(path)), kinds.index(_module(path))
            # Two of one name in a block (experts) lie on one another: together they have the root of their squares.
            sums[place] = np.hypot(0.0 if np.isnan(sums[place]) else sums[place], value)
        image = axes.imshow(sums, aspect="auto", cmap="viridis")
        axes.set_title(title, parse_math=False)
        axes.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=8, parse_math=False)
        axes.set_yticks(range(len(blocks)), ["" if block < 0 else str(block) for block in blocks], fontsize=7)
        axes.set_ylabel("block")
        figure.colorbar(image, ax=axes)
    return figure


def similarity_figure(layers: Sequence[LayerSimilarity]) -> Any:
    """phi(i, j) as squares, for each kind of module the mean over blocks: the output's directions above, the input's below."""
    kinds = {kind: [layer for layer in found if layer.left] for kind, found in _by_module(layers).items()}
    kinds = {kind: found for kind, found in kinds.items() if found}
    figure = make_figure(PURPOSE, figsize=(1.9 * len(kinds) + 1.2, 4.6), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False)
    for column, (kind, found) in enumerate(kinds.items()):
        for axes, side in zip(panels[:, column], ("left", "right"), strict=True):
            grid = mean_grid([getattr(layer, side) for layer in found])
            ends = (0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5)  # directions are counted from 1
            image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", origin="lower", extent=ends, aspect="auto")
            axes.locator_params(integer=True)
            axes.set_title(f"{kind}, {'output' if side == 'left' else 'input'}", parse_math=False, fontsize=9)
    figure.supxlabel("j, directions of the second")
    figure.supylabel("i, directions of the first")
    figure.colorbar(image, ax=list(panels.flat), label="phi(i, j)")
    return figure


def mean_grid(grids: Sequence[Grid]) -> Any:
    """Return the mean of grids, over the directions that all of them have."""
    rows, columns = min(len(grid) for grid in grids), min(len(grid[0]) for grid in grids)
    return np.mean([[row[:columns] for row in grid[:rows]] for grid in grids], axis=0)


def _by_module(layers: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for layer in sorted(layers, key=lambda layer: _block(layer.path)):
        found.setdefault(_module(layer.path), []).append(layer)
    return found


def _module(path: str) -> str:
    return path.rpartition(".")[2]


def _block(path: str) -> int:
    index = block_index(path, None)
    return -1 if index is None else index
