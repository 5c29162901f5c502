"""What the instruments found, as tables of words and as one HTML file that needs nothing else: no network, no script."""

from collections.abc import Mapping, Sequence

from luthier.core.page import Table, html_page, html_remarks, html_section, html_table
from luthier.inspect.similarity import LayerSimilarity, Similarity
from luthier.inspect.spectra import AdapterSpectra, LayerSpectrum, OtherTensor


def layer_table(layers: Sequence[LayerSpectrum], share: float) -> Table:
    """Return one row for each layer. What nothing is known about has no column."""
    head = ["layer", "r", "|delta|", "s_1", "stable rank", "effective rank", f"rank for {share:.4g}"]
    rows = [
        [
            layer.path,
            str(layer.r),
            f"{layer.delta_norm:.4f}",
            f"{layer.singular_values[0]:.3g}" if layer.singular_values else "",
            f"{layer.stable_rank:.2f}",
            f"{layer.effective_rank:.2f}",
            str(layer.suggested_rank),
        ]
        for layer in layers
    ]
    if any(layer.base is not None for layer in layers):
        head += ["share of W", "rounded away", "above floor"]
        for row, layer in zip(rows, layers, strict=True):
            row += _beside_base(layer)
    if any(layer.base is not None and layer.base.magnitude_change is not None for layer in layers):
        head.append("magnitude change")
        for row, layer in zip(rows, layers, strict=True):
            known = layer.base is not None and layer.base.magnitude_change is not None
            row.append(f"{layer.base.magnitude_change:.3%}" if known and layer.base else "")
    return head, rows


def _beside_base(layer: LayerSpectrum) -> list[str]:
    if layer.base is None:
        return ["", "", ""]
    lost = layer.base.rounded_away
    above = layer.base.above_floor
    return [f"{layer.base.share:.3%}", "" if lost is None else f"{lost:.1%}", "" if above is None else f"{above} of {layer.r}"]


def other_table(others: Sequence[OtherTensor]) -> Table:
    """Return one row for each trained tensor that is no pair."""
    changes = ["" if other.change_norm is None else f"{other.change_norm:.4f}" for other in others]
    rows = [
        [other.name, " x ".join(map(str, other.shape)), f"{other.norm:.4f}", change]
        for other, change in zip(others, changes, strict=True)
    ]
    return ["tensor", "shape", "norm", "|change|"], rows


def similarity_table(layers: Sequence[LayerSimilarity]) -> Table:
    """Return one row for each layer that both adapters have: phi of the first direction, of all, and what chance would give."""
    head = ["layer", "directions", "output phi(1, 1)", "of all", "by chance", "input phi(1, 1)", "of all", "by chance", "cosine"]
    rows = []
    for layer in layers:
        row = [layer.path, " and ".join(map(str, layer.ranks))]
        for grid, chance in zip((layer.left, layer.right), layer.by_chance, strict=True):
            row += [f"{grid[0][0]:.3f}", f"{grid[-1][-1]:.3f}", f"{chance:.3f}"] if grid else ["", "", ""]
        rows.append([*row, f"{layer.cosine:+.3f}"])
    return head, rows


def html_report(
    title: str,
    facts: Mapping[str, object],
    spectra: AdapterSpectra,
    remarks: Sequence[str],
    similarity: Similarity | None,
    pictures: Mapping[str, bytes],
) -> str:
    """Return the whole report as one HTML document; `facts` are its head, `pictures` PNG files by name."""
    parts = [html_table((["", ""], [[key, str(value)] for key, value in facts.items() if value])), *html_remarks(remarks)]
    parts += html_section("Sizes", pictures.get("norms.png"), None)
    parts += html_section(
        "Spectra", pictures.get("spectra.png"), layer_table(spectra.layers, spectra.share) if spectra.layers else None
    )
    parts += html_section("Trained whole", None, other_table(spectra.others) if spectra.others else None)
    if similarity is not None:
        parts += html_section("Against the other adapter", pictures.get("similarity.png"), similarity_table(similarity.layers))
    return html_page(title, parts)
