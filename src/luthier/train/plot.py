"""Pictures: the loss curve of a run, several runs, metrics along a run, and pairs of several ranks beside a full fine-tune."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.core.figures import as_png, make_figure

SMOOTHING = 0.9


def plot_losses(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss (each step, and smoothed) and held-out loss over steps into a PNG; rewards instead, where there are any.

    Raises: MissingExtraError.
    """
    is_rewarded = any("reward" in record for record in records)
    key, held_out_key, word = ("reward", "eval_reward", "mean reward") if is_rewarded else ("loss", "eval_loss", "loss")
    best_of = max if is_rewarded else min
    figure = make_figure("drawing the loss curve", figsize=(7, 4), layout="constrained")
    trained = [(record["step"], record[key]) for record in records if key in record]
    held_out = [(record["step"], record[held_out_key]) for record in records if held_out_key in record]
    axes = figure.subplots()
    if trained:
        axes.plot(*zip(*trained, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
        steps, losses = zip(*trained, strict=True)
        axes.plot(steps, smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")
        best = best_of(held_out, key=lambda pair: pair[1])
        axes.annotate(f"best {best[1]:.4f}", best, textcoords="offset points", xytext=(0, 8), horizontalalignment="right")
    # The title names the user's files; a $ in one is no formula.
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="optimiser step", ylabel=word if is_rewarded else "loss per answer token (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomic(path, as_png(figure))


def plot_runs(runs: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path) -> None:
    """Draw the losses of several runs over each other into a PNG: held out on the left, training (smoothed) on the right.

    `runs` maps names to (step, value) pairs of "eval_loss" and "loss"; a panel that no run has values for is left out.
    Raises: MissingExtraError.
    """
    titles = {"eval_loss": "held out", "loss": "training, smoothed"}
    shown = [key for key in titles if any(run.get(key) for run in runs.values())] or ["loss"]
    figure = make_figure("drawing runs", figsize=(5.5 * len(shown), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for index, (name, run) in enumerate(runs.items()):
            if points := run.get(key):
                steps, values = zip(*points, strict=True)
                drawn = values if key == "eval_loss" else smoothed(values)
                axes.plot(steps, drawn, color=f"C{index}", marker="o" if key == "eval_loss" else "", markersize=4, label=name)
        axes.set_title(titles[key])
        axes.set(xlabel="optimiser step", ylabel="loss")
        axes.grid(alpha=0.3)
        _name_lines(axes)
    write_atomic(path, as_png(figure))


def plot_trajectory(
    metrics: Mapping[str, Sequence[tuple[int, float]]], base: Mapping[str, float], path: Path, title: str
) -> None:
    """Draw metrics of the adapters along a run over its steps into a PNG, each with the base's value as a dashed line.

    A metric called "loss" has a panel of its own; the others are shares. Raises: MissingExtraError.
    """
    panels = [[key for key in metrics if key != "loss"], ["loss"] * ("loss" in metrics)]
    panels = [panel for panel in panels if panel]
    figure = make_figure("drawing a trajectory", figsize=(5.5 * len(panels), 4), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, key in enumerate(panel):
            axes.plot(*zip(*metrics[key], strict=True), color=f"C{index}", marker="o", markersize=4, label=key)
            if key in base:
                axes.axhline(base[key], color=f"C{index}", linewidth=1, linestyle="--")
        is_loss = panel == ["loss"]
        axes.set(xlabel="optimiser step", ylabel="held-out loss per answer token (nats)" if is_loss else "share of rows")
        axes.grid(alpha=0.3)
        _name_lines(axes)
    figure.suptitle(title, parse_math=False)
    write_atomic(path, as_png(figure))


def plot_baseline(pairs: dict[int, dict[str, Any]], full: dict[str, Any], path: Path, title: str) -> None:
    """Draw held-out loss, and exact match where it was judged, against trained parameters into a PNG.

    `pairs` maps ranks to what came of them: `parameters`, `eval_loss` and `exact_match`; `full` is what came of every weight.
    Raises: MissingExtraError.
    """
    words = {"eval_loss": "held-out loss per answer token (nats)", "exact_match": "exact match"}
    measures = [key for key in words if all(each[key] is not None for each in (full, *pairs.values()))]
    figure = make_figure("drawing the comparison", figsize=(4.5 * len(measures), 4), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(measures), squeeze=False)[0], measures, strict=True):
        points = [(each["parameters"], each[key]) for each in pairs.values()]
        axes.plot(*zip(*points, strict=True), marker="o", color="tab:blue", label="pairs")
        for r, point in zip(pairs, points, strict=True):
            axes.annotate(f"r={r}", point, textcoords="offset points", xytext=(4, 4))
        axes.plot([full["parameters"]], [full[key]], marker="s", color="tab:orange", linestyle="", label="every weight")
        axes.axhline(full[key], color="tab:orange", linewidth=1, linestyle="--")
        axes.set(xscale="log", xlabel="trained parameters", ylabel=words[key])
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, parse_math=False)
    write_atomic(path, as_png(figure))


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, without the bias towards its start."""
    total, weight, out = 0.0, 0.0, []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1
        out.append(total / weight)
    return out


def _name_lines(axes: Any) -> None:
    """Add the legend, where anything is drawn. A $ in the name of a user's file is no formula."""
    if axes.get_lines():
        for text in axes.legend().get_texts():
            text.set_parse_math(False)
