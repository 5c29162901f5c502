"""The loss curve as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.core.figures import as_png, make_figure

SMOOTHING = 0.9


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss (each step, and smoothed) and held-out loss over steps into a PNG. Raises: MissingExtraError."""
    trained = [(record["step"], record["loss"]) for record in records if "loss" in record]
    held_out = [(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]
    figure = make_figure("drawing the loss curve", figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
        best = min(held_out, key=lambda pair: pair[1])
        axes.annotate(f"best {best[1]:.4f}", best, textcoords="offset points", xytext=(0, 8), horizontalalignment="right")
    # The title names the user's files; a $ in one is no formula.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="optimiser step", ylabel="loss per answer token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, as_png(figure))


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, without the bias towards its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        out.append(total / weight)
    return out
