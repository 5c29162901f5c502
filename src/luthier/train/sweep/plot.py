"""The pictures of a search and of a learning curve."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from luthier.core.atomic import write_atomic
from luthier.core.figures import as_png, make_figure

if TYPE_CHECKING:
    from luthier.train.sweep.power_law import PowerLaw
    from luthier.train.sweep.search import Sweep

LOSS = "held-out loss per answer token (nats)"


def plot_search(sweep: "Sweep", path: Path) -> None:
    """Draw the trials' losses in their order, over learning rates and over ranks into a PNG. Raises: MissingExtraError."""
    figure = make_figure("drawing the search", figsize=(12, 4), layout="constrained")
    order, rates, ranks = figure.subplots(1, 3, sharey=True)
    trials = [trial for trial in sweep.trials() if trial.loss is not None]
    best = sweep.best()
    for state, marker, color in (("complete", "o", "tab:blue"), ("pruned", "x", "tab:gray")):
        some = [trial for trial in trials if trial.state == state]
        losses = [trial.loss for trial in some]
        words = "to the end" if state == "complete" else "ended early"
        order.scatter([trial.proposal.number for trial in some], losses, marker=marker, color=color, label=words)
        rates.scatter([trial.proposal.learning_rate for trial in some], losses, marker=marker, color=color)
        ranks.scatter([trial.proposal.r for trial in some], losses, marker=marker, color=color)
    complete = [(trial.proposal.number, trial.loss) for trial in trials if trial.state == "complete" and trial.loss is not None]
    if complete:
        numbers, values = zip(*complete, strict=True)
        order.plot(numbers, np.minimum.accumulate(values), color="tab:blue", alpha=0.4, label="best so far")
    if best is not None:
        places = (best.proposal.number, best.proposal.learning_rate, best.proposal.r)
        for axes, place in zip((order, rates, ranks), places, strict=True):
            axes.scatter([place], [best.loss], s=140, facecolors="none", edgecolors="tab:orange", linewidths=2)
    order.set(xlabel="trial", ylabel=LOSS)
    rates.set(xlabel="learning rate", xscale="log")
    ranks.set(xlabel="rank", xscale="log", xticks=sweep.settings.ranks)
    ranks.set_xticks(sweep.settings.ranks, [str(r) for r in sweep.settings.ranks], minor=False)
    ranks.minorticks_off()
    # A trial that went astray must not hide the others.
    seen = [trial.loss for trial in trials if trial.loss is not None]
    if complete and seen:
        low, high = min(seen), max(loss for _, loss in complete)
        order.set_ylim(low - 0.08 * (high - low) - 1e-6, min(max(seen), high + (high - low)) + 0.08 * (high - low) + 1e-6)
    for axes in (order, rates, ranks):
        axes.grid(alpha=0.3)
    order.legend()
    figure.suptitle(f"{sweep.given.model}, {sweep.given.data.path}", parse_math=False)
    write_atomic(path, as_png(figure))


def plot_curve(points: list[dict[str, Any]], law: "PowerLaw", path: Path, title: str) -> None:
    """Draw losses over numbers of rows, and the fitted law with its 90 % band, into a PNG. Raises: MissingExtraError."""
    figure = make_figure("drawing the learning curve", figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    most = max(point["rows"] for point in points)
    grid = np.geomspace(min(point["rows"] for point in points), 4 * most, 60)
    low, middle, high = np.array([law.loss_at(rows) for rows in grid]).T
    axes.fill_between(grid, low, high, color="tab:blue", alpha=0.2, linewidth=0, label="90 % of what fits")
    axes.plot(grid, middle, color="tab:blue", label="fitted law")
    places = [(point["rows"], point["loss"]) for point in points]
    axes.scatter(*zip(*places, strict=True), color="tab:orange", zorder=3, label="runs")
    axes.axvline(2 * most, color="tab:gray", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="rows to train on (dashed: twice as many)", ylabel=LOSS)
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, as_png(figure))
