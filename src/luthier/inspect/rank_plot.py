"""Trained parameters against rank, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from luthier.core.atomic import write_atomic
from luthier.core.figures import as_png, make_figure
from luthier.inspect.counts import RankRow


def plot_ranks(rows: Sequence[RankRow], num_parameters: int, path: Path, title: str) -> None:
    """Draw how many parameters are trained at each rank, and all of the model's, into a PNG. Raises: MissingExtraError."""
    figure = make_figure("drawing parameters against rank", figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row.r for row in rows], [row.num_trained for row in rows], "o-", label="trained by the adapter")
    axes.axhline(num_parameters, color="tab:gray", linestyle="--", label="full fine-tuning")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([row.r for row in rows], [str(row.r) for row in rows])
    # The title names the user's files; a $ in one is no formula.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="rank", ylabel="trained parameters")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, as_png(figure))
