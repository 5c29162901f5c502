"""Draw the pictures of docs/lora.md into docs/pictures: python scripts/make_lora_plots.py

Each picture is one function, which returns the numbers that it draws: {line: [(x, y), ...]}. They are also written into the
PNG itself (its text field "numbers"), where a test reads them and recomputes them in another way.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from luthier.adapt import plan
from luthier.core.config import LoraConfig
from luthier.core.lora import fold, init_linear_pair, lora_delta, lora_linear, lora_scaling

PICTURES = Path(__file__).resolve().parent.parent / "docs/pictures"
Lines = dict[str, list[tuple[float, float]]]
BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#d9720c", "#2b8a3e", "#6b7280"

# Hidden width, feed-forward width, layers, heads, key-value heads, vocabulary, whether embedding and head are one.
MODELS = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152, True),
    "LLaMA-7B": (4096, 11008, 32, 32, 32, 32_000, False),
    "LLaMA-65B": (8192, 22016, 80, 64, 64, 32_000, False),
}


# --- the pictures ----------------------------------------------------------------------------------------------


def trained_share(axes: Any) -> Lines:
    """How many numbers are trained, as a share of the model's, over the rank."""
    ranks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    lines: Lines = {}
    for (name, sizes), colour in zip(MODELS.items(), (GREEN, BLUE, ORANGE), strict=True):
        model = llama_on_meta(*sizes)
        for what, targets, style in (("all linear layers", "all-linear", "-"), ("q and v", ["q_proj", "v_proj"], ":")):
            shares = [100 * plan(model, LoraConfig(r=r, target_modules=targets)).share for r in ranks]
            lines[f"{name}, {what}"] = list(zip(ranks, shares, strict=True))
            axes.plot(ranks, shares, color=colour, linestyle=style, linewidth=2, marker="o", markersize=3)
            if targets == "all-linear":
                axes.annotate(name, (ranks[-1], shares[-1]), (6, 0), textcoords="offset points", color=colour, va="center")
    axes.plot([], [], color="black", linestyle="-", label="all linear layers")
    axes.plot([], [], color="black", linestyle=":", label="q and v only")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_yticks([0.01, 0.1, 1, 10], ["0.01 %", "0.1 %", "1 %", "10 %"])
    axes.set_xlim(0.9, 1000)
    marked = dict(lines["LLaMA-7B, all linear layers"])[8]
    arrow = {"arrowstyle": "-", "color": BLUE, "shrinkB": 3}
    axes.annotate(f"LLaMA-7B, r = 8: {marked:.2f} %", (8, marked), (1.1, 2.2), color=BLUE, arrowprops=arrow)
    axes.set(title="The larger the model, the smaller the share that a rank trains", xlabel="rank r", ylabel="share of the model")
    axes.legend(loc="upper left", frameon=False)
    return lines


def update_size(axes: Any) -> Lines:
    """How large the update's output is over the rank, for both scalings: B's entries are of size 1, as if trained alike."""
    ranks, width = [1, 2, 4, 8, 16, 32, 64, 128, 256], 2048
    lines: Lines = {}
    for rslora, colour, label in ((True, ORANGE, "alpha / sqrt(r)"), (False, BLUE, "alpha / r")):
        torch.manual_seed(0)
        spread = []
        for r in ranks:
            lora_A, _ = init_linear_pair(r, width, width, True, torch.device("cpu"))
            update = lora_linear(torch.randn(128, width), lora_A, torch.randn(width, r), lora_scaling(r, 16, rslora))
            spread.append(update.std().item())
        lines[label] = list(zip(ranks, spread, strict=True))
        axes.plot(ranks, spread, color=colour, linewidth=2, marker="o", markersize=4)
        axes.annotate(label, (ranks[-1], spread[-1]), (8, 0), textcoords="offset points", color=colour, va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.set_xlim(0.9, 1000)
    axes.set(
        title="With alpha / r the update shrinks as the rank grows; alpha / sqrt(r) holds it",
        xlabel="rank r",
        ylabel="standard deviation of the update's output",
    )
    return lines


def worked_example(axes: Any) -> Lines:
    """The loss of the worked example over gradient steps, from its own B and from a B of zeros."""
    steps = 40
    lines: Lines = {}
    starts = (
        ("from the example's B", EXAMPLE_B, BLUE, (30, 0.02)),
        ("from B = 0, as adapters start", torch.zeros_like(EXAMPLE_B), ORANGE, (15.5, 0.85)),
    )
    for label, start, colour, place in starts:
        losses = descend(EXAMPLE_A, start, steps)
        lines[label] = list(enumerate(losses))
        axes.plot(losses, color=colour, linewidth=2)
        axes.annotate(label, place, color=colour)
    axes.set_yscale("log")
    axes.set_yticks([1, 0.1, 0.01, 0.001], ["1", "0.1", "0.01", "0.001"])
    axes.set(xlim=(0, steps), ylim=(5e-4, 2))
    axes.set(title="From B = 0 the first steps are slow: A waits for B to move", xlabel="gradient steps", ylabel="loss")
    return lines


def stored_update(axes: Any) -> Lines:
    """Singular values of a rank-8 update after its fine-tuned weight was stored in bfloat16."""
    torch.manual_seed(0)
    size, r = 512, 8
    weight = (0.02 * torch.randn(size, size)).bfloat16().float()
    lora_A, lora_B = torch.randn(r, size), torch.randn(size, r)
    shown = 24
    lines: Lines = {}
    for share, colour in ((0.03, ORANGE), (0.01, GREEN), (0.003, BLUE), (0.001, GREY)):
        delta = lora_delta(lora_A, lora_B, 1.0)
        delta *= share * weight.norm() / delta.norm()
        stored = fold(weight, [delta]).bfloat16().float() - weight
        values = torch.linalg.svdvals(stored.double()) / weight.double().norm()
        kept = (values[:r].square().sum() / values.square().sum()).item()
        lines.setdefault("energy of rank 8", []).append((share, kept))
        label = f"{100 * share:g} %: {100 * kept:.3g} % of its energy is of rank 8"
        values = values[:shown].tolist()
        lines[f"{100 * share:g} %"] = list(enumerate(values, 1))
        axes.plot(range(1, shown + 1), values, color=colour, linewidth=2, marker="o", markersize=4, label=label)
    axes.axvline(r + 0.5, color="black", linewidth=1, linestyle="--")
    axes.annotate("rank of the update", (r + 0.5, 1.2e-2), (6, 0), textcoords="offset points")
    axes.set_yscale("log")
    axes.set_yticks([1e-4, 1e-3, 1e-2], ["0.01 %", "0.1 %", "1 %"])
    axes.set_xticks([1, 4, 8, 12, 16, 20, 24])
    axes.legend(title="norm of the update / norm of the weight", frameon=False, loc="upper right")
    axes.set(
        title="Stored in bfloat16, a small rank-8 update looks like one of high rank",
        xlabel="number of the singular value",
        ylabel="singular value / norm of the weight",
    )
    return lines


def memory_by_part(axes: Any) -> Lines:
    """What stays in memory while LLaMA-7B is trained, by part, without activations."""
    model = llama_on_meta(*MODELS["LLaMA-7B"])
    planned = plan(model, LoraConfig(r=16))
    base, adapter = planned.num_base_parameters, planned.num_parameters
    linear = sum(layer.in_features * layer.out_features for layer in planned.layers)
    bits = 4 + 8 / 64 + 32 / (64 * 256)  # NF4: a code, an 8-bit scale for 64 of them, a float32 scale for 256 of those
    nf4 = bits / 8 * linear + 2 * (base - linear)
    parts = {  # bytes: weights, float32 copies or the adapter, gradients, Adam's two averages
        "full fine-tuning\n(bfloat16, float32 masters)": (2 * base, 4 * base, 2 * base, 8 * base),
        "LoRA, r = 16\n(bfloat16 base)": (2 * base, 4 * adapter, 4 * adapter, 8 * adapter),
        "QLoRA, r = 16\n(4-bit base)": (nf4, 4 * adapter, 4 * adapter, 8 * adapter),
    }
    labels = ("base weights", "float32 masters or adapter", "gradients", "Adam's averages")
    lines: Lines = {label: [] for label in labels}
    for place, sizes in enumerate(parts.values()):
        start = 0.0
        for label, size, colour in zip(labels, sizes, (BLUE, GREEN, ORANGE, GREY), strict=True):
            axes.barh(place, size / 1e9, left=start, color=colour, height=0.55, label=label if place == 0 else None)
            lines[label].append((place, size / 1e9))
            start += size / 1e9
        axes.annotate(f"{start:.1f} GB", (start, place), (6, 0), textcoords="offset points", va="center", weight="bold")
    axes.set_yticks(range(len(parts)), list(parts))
    axes.invert_yaxis()
    axes.set_xlim(0, 125)
    axes.legend(frameon=False, loc="lower right")
    axes.grid(visible=False, axis="y")
    axes.set(title="LoRA saves gradients and optimiser states, not the base", xlabel="LLaMA-7B, GB without activations")
    return lines


# --- what they compute from ------------------------------------------------------------------------------------

# The worked example of docs/lora.md: h = W x, half the squared error against ones, learning rate 0.1, scaling 1.
EXAMPLE_W = torch.tensor([[1, 0, -1, 2], [0, 1, 1, -1], [2, -2, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)
EXAMPLE_A = torch.tensor([[0.1, 0.2, 0.3, 0.4], [-0.1, -0.2, 0, 0.1]], dtype=torch.float64)
EXAMPLE_B = torch.tensor([[1, 0], [0, 1], [0.5, -0.5], [-1, 1]], dtype=torch.float64)
EXAMPLE_X = torch.tensor([[1, 0, 0, 0]], dtype=torch.float64)


def descend(lora_A: torch.Tensor, lora_B: torch.Tensor, steps: int, rate: float = 0.1) -> list[float]:
    """Return the worked example's loss before each of `steps` gradient steps, and after the last."""
    lora_A, lora_B = lora_A.clone().requires_grad_(), lora_B.clone().requires_grad_()
    losses = []
    for _ in range(steps + 1):
        h = EXAMPLE_X @ EXAMPLE_W.T + lora_linear(EXAMPLE_X, lora_A, lora_B, lora_scaling(2, 2))
        loss = 0.5 * (h - 1).square().sum()
        losses.append(loss.item())
        for factor, gradient in zip((lora_A, lora_B), torch.autograd.grad(loss, (lora_A, lora_B)), strict=True):
            factor.data -= rate * gradient
    return losses


def llama_on_meta(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> Any:
    """Return a Llama model without numbers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_hidden_layers": layers, "vocab_size": vocab}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads_of))


DRAWN: list[Callable[[Any], Lines]] = [trained_share, update_size, worked_example, stored_update, memory_by_part]


def draw(picture: Callable[[Any], Lines], folder: Path) -> Path:
    """Draw one picture into a folder, with its numbers inside, and return its path."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    lines = picture(axes)
    axes.title.set(fontsize=12, fontweight="bold")
    path = folder / f"{picture.__name__.replace('_', '-')}.png"
    figure.savefig(path, dpi=110, metadata={"numbers": json.dumps(lines), "Software": None})
    return path


def main(folder: Path = PICTURES) -> None:
    """Draw all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in DRAWN:
        path = draw(picture, folder)
        print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES)
