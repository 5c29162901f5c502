"""Pictures carry the numbers that were measured, each in its place; the report lets no text become markup."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from luthier.formats.pairs import StoredPair
from luthier.inspect.pictures import mean_grid, norms_figure, similarity_figure, spectra_figure
from luthier.inspect.report import html_report
from luthier.inspect.similarity import compare_layer
from luthier.inspect.spectra import AdapterSpectra, LayerSpectrum, against_base, layer_spectrum

pytest.importorskip("matplotlib")
PATHS = [f"model.layers.{block}.{name}" for block in (0, 10, 2) for name in ("q_proj", "up_proj")] + ["head"]


def pair(path: str, r: int = 3) -> StoredPair:
    keys = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    return StoredPair(path, path, "linear", 2.0, torch.randn(r, 12), torch.randn(9, r), keys)


@pytest.fixture
def layers() -> list[LayerSpectrum]:
    """Return the spectra of seven layers, of which the head has no weight to be held against."""
    found = []
    for path in PATHS:
        stored = pair(path)
        spectrum = layer_spectrum(stored, 0.9)
        base = against_base(stored, spectrum, torch.randn(9, 12)) if path != "head" else None
        found.append(replace(spectrum, base=base))
    return found


def test_each_layer_is_a_line_of_its_values(layers: list[LayerSpectrum]) -> None:
    figure = spectra_figure(layers)
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert set(panels) == {"q_proj (3)", "up_proj (3)", "head (1)"}
    for line, block in zip(panels["q_proj (3)"].lines, (0, 2, 10), strict=False):  # by number, not by letter
        (layer,) = (layer for layer in layers if layer.path == f"model.layers.{block}.q_proj")
        assert line.get_ydata() == pytest.approx(layer.singular_values)
    floors = sorted(layer.base.noise_floor for layer in layers if layer.base and "q_proj" in layer.path)
    assert panels["q_proj (3)"].lines[3].get_ydata()[0] == pytest.approx(floors[1])
    assert len(panels["head (1)"].lines) == 1


def test_each_square_of_the_heat_map_is_its_layer_s(layers: list[LayerSpectrum]) -> None:
    figure = norms_figure(layers)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in figure.axes if axes.images] == ["|dW|", "|change| / |W|"]
    kinds = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["", "0", "2", "10"]
    found = {layer.path: layer for layer in layers}
    for row, block in enumerate([None, 0, 2, 10]):
        for column, kind in enumerate(kinds):
            layer = found.get(kind if block is None else f"model.layers.{block}.{kind}")
            if layer is None:
                assert np.isnan(images[0].data[row, column])
                continue
            assert images[0].data[row, column] == pytest.approx(layer.delta_norm)
            if layer.base is not None:
                assert images[1].data[row, column] == pytest.approx(layer.base.share)


def test_grids_are_means_over_the_directions_that_all_have() -> None:
    assert mean_grid([((1.0, 0.5), (0.0, 0.5)), ((0.5, 0.5, 9.0),)]).tolist() == [[0.75, 0.5]]
    similar = [compare_layer(pair(path, r), pair(path, 2)) for path, r in zip(PATHS, (3, 3, 4, 3, 3, 3, 3), strict=True)]
    images = {axes.get_title(): axes.images[0].get_array() for axes in similarity_figure(similar).axes if axes.images}
    expected = np.mean([np.array(layer.right)[:3] for layer in similar if "q_proj" in layer.path], axis=0)
    np.testing.assert_allclose(images["q_proj, input"], expected)


def test_names_stay_names_in_the_report(layers: list[LayerSpectrum]) -> None:
    odd = replace(layers[0], path="<script>alert(1)</script>")
    page = html_report("a & b", {"folder": "<b>", "base": None}, AdapterSpectra((odd,), (), 0.9, ()), ["x < y"], None, {})
    assert "<script>" not in page and "<b>" not in page
    for escaped in ("&lt;script&gt;", "a &amp; b", "&lt;b&gt;", "x &lt; y"):
        assert escaped in page
