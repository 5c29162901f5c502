"""After training: does the model stop by itself, what of the rows was trained on, and which layers moved how far.

All of it is cheap: a few held-out prompts are answered at once, and the size of an update comes from its two factors alone.
What the numbers mean in detail is told by `luthier inspect`.

Not here: whether answers are right (`luthier eval`).
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from luthier.adapt.fusing import fuse, fusion_of, unfuse
from luthier.adapt.state import adapted_modules
from luthier.adapt.switching import activate
from luthier.core.atomic import write_atomic
from luthier.core.errors import MissingExtraError
from luthier.core.figures import as_png, make_figure
from luthier.core.names import block_index
from luthier.core.spectrum import factored_norm
from luthier.data.encode import UNLABELLED, render_prompt
from luthier.data.messages import Example
from luthier.engine.generation import generate
from luthier.layers.pair import LoraPair, ParameterPair, ParameterPairs
from luthier.ops.packed import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from luthier.train.loop import Trainer
    from luthier.train.prepare import Prepared

PROMPTS = 8
MORE_TOKENS = 24
"""How far beyond the longest of their right answers the model may go before it counts as not stopping."""
LONGEST_ANSWER = 256
"""Prompts with longer answers are not asked: that would take longer than a glance."""


@dataclass(frozen=True)
class Stopping:
    """How many of some held-out prompts the model ended by itself. `unfinished` are the rows of the others."""

    asked: int
    stopped: int
    max_new_tokens: int
    unfinished: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class LayerChange:
    """How far one layer moved. Norms are Frobenius norms; `grad_norms` are of (step, gradient before clipping)."""

    path: str
    delta_norm: float
    """|scaling * B A|; with DoRA of the low-rank part alone."""
    share: float | None
    """delta_norm / |W|; None where the base's weight is no matrix of this process's."""
    grad_norms: tuple[tuple[int, float], ...]

    @property
    def has_moved(self) -> bool:
        """False where the update is nothing, or no gradient that was looked at was anything."""
        return self.delta_norm > 0 and (not self.grad_norms or any(norm > 0 for _, norm in self.grad_norms))


def layer_changes(
    model: nn.Module, adapter: str, gradients: Sequence[dict[str, Any]] = (), *, with_base: bool = True
) -> list[LayerChange]:
    """Return how far each layer of an adapter moved; `gradients` are the lines of layers.jsonl, `with_base` compares with W."""
    found = []
    for path, module in adapted_modules(model):
        norms, weights = [], []
        for pair, weight in _pairs(module, adapter):
            norms.append(_delta_norm(pair))
            weights.append(_norm(weight) if with_base else None)
        if not norms:
            continue
        delta = math.hypot(*norms)
        whole = math.hypot(*(each for each in weights if each is not None)) if None not in weights else 0.0
        seen = tuple((line["step"], line["grad_norms"][path]) for line in gradients if path in line["grad_norms"])
        found.append(LayerChange(path, delta, delta / whole if whole else None, seen))
    return found


def stopping(prepared: "Prepared") -> Stopping | str:
    """Ask the model, as it is, some held-out prompts; or return why there are none to ask."""
    rows = prepared.rows
    examples = [each for each in rows.held_out_examples if isinstance(each, Example) and each.text is None]
    if rows.held_out is None or not examples:
        return "no held-out prompts"
    answers: dict[int, int] = {}
    for row in rows.held_out.rows:
        answers[row.row] = sum(label != UNLABELLED for label in row.labels)
    short = [each for each in examples if 0 < answers.get(each.row, 0) <= LONGEST_ANSWER]
    if not short:
        return f"no held-out answer has {LONGEST_ANSWER} tokens or fewer"
    some = short[:: max(1, len(short) // PROMPTS)][:PROMPTS]
    most = max(answers[each.row] for each in some) + MORE_TOKENS
    model, tokenizer = prepared.base.model, prepared.base.tokenizer
    prompts = [render_prompt(each, tokenizer) for each in some]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked = [(each, ids) for each, ids in zip(some, prompts, strict=True) if room is None or len(ids) + most <= room]
    if not asked:
        return "the held-out prompts leave the model no room to answer"
    began = time.perf_counter()
    said = generate(model, tokenizer, [ids for _, ids in asked], max_new_tokens=most, batch_rows=PROMPTS)
    unfinished = tuple(each.row for (each, _), one in zip(asked, said, strict=True) if one.finish_reason != "stop")
    return Stopping(len(asked), len(asked) - len(unfinished), most, unfinished, time.perf_counter() - began)


def aftermath(trainer: "Trainer") -> dict[str, Any]:
    """Return the report on the adapter that is in the model now, as plain values; `notes` are what a user should look at."""
    prepared, is_whole = trainer.prepared, trainer.sharded is None
    stops: Stopping | str = "the base is spread over several processes"
    if is_whole:
        activate(prepared.base.model, prepared.adapter)
        with _unfused(prepared.base.model):
            stops = stopping(prepared)
    layers = layer_changes(prepared.base.model, prepared.adapter, trainer.folder.read_layers(), with_base=is_whole)
    coverage = prepared.rows.train.report
    unmoved = [layer.path for layer in layers if not layer.has_moved]
    return {
        "stops": asdict(stops) if isinstance(stops, Stopping) else {"asked": 0, "reason": stops},
        "coverage": coverage.as_dict(),
        "layers": {layer.path: {key: value for key, value in asdict(layer).items() if key != "path"} for layer in layers},
        "unmoved": unmoved,
        "plot": _plot(layers, trainer.folder.path / "layers.png"),
        "notes": [*_notes(stops, unmoved, len(layers), coverage.rows_with_stop == 0), *coverage.warnings],
    }


@contextmanager
def _unfused(model: "PreTrainedModel") -> Iterator[None]:
    """Within the block the model's blocks are its own; afterwards as before, since others may go on with it."""
    was_fused = bool(fusion_of(model).attentions)
    unfuse(model)
    try:
        yield
    finally:
        if was_fused:
            fuse(model)


def told(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the report in words: (subject, line)."""
    stops = report["stops"]
    if stops["asked"]:
        allowed = f"within {stops['max_new_tokens']} tokens"
        yield "stops", f"by itself on {stops['stopped']} of {stops['asked']} held-out prompts, {allowed}"
    coverage = report["coverage"]
    yield (
        "labels",
        f"{coverage['share']:.1%} of the tokens; {coverage['rows_with_stop']:,} of {coverage['rows']:,} rows teach to stop",
    )
    shares = {path: layer["share"] for path, layer in report["layers"].items() if layer["share"] is not None}
    if shares:
        least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
        yield "changed", f"|dW|/|W| from {shares[least]:.2%} ({least}) to {shares[most]:.2%} ({most})"
    last = {path: layer["grad_norms"][-1][1] for path, layer in report["layers"].items() if layer["grad_norms"]}
    if last:
        least, most = min(last, key=last.__getitem__), max(last, key=last.__getitem__)
        yield "gradients", f"at the last look from {last[least]:.2g} ({least}) to {last[most]:.2g} ({most})"
    for note in report["notes"]:
        yield "note", note


def _notes(stops: Stopping | str, unmoved: list[str], layers: int, teaches_none: bool) -> Iterator[str]:
    if isinstance(stops, Stopping) and stops.unfinished:
        why = "no row teaches to stop" if teaches_none else "train longer, or look at the answers with luthier generate"
        rows = ", ".join(map(str, stops.unfinished))
        count = f"{len(stops.unfinished)} of {stops.asked} prompts (held-out rows {rows})"
        yield f"the model did not stop by itself on {count}: {why}"
    if unmoved:
        some = ", ".join(unmoved[:5]) + (f" and {len(unmoved) - 5} more" if len(unmoved) > 5 else "")
        yield f"{len(unmoved)} of {layers} layers never moved: {some}"


def _pairs(module: nn.Module, adapter: str) -> Iterator[tuple[LoraPair, Tensor | None]]:
    """Yield the pairs an adapter has in a module, each with the base's weight it is added to."""
    held: Any = module.lora
    if adapter not in held:
        return
    own = held[adapter]
    if isinstance(own, ParameterPairs):
        for name, pair in own.named_children():
            if isinstance(pair, LoraPair):
                yield pair, module._parameters.get(name)
        return
    weight = module._parameters.get("weight")
    yield own, weight if weight is not None else module._parameters.get("in_proj_weight")
    if own.out is not None:
        out: Any = module.out_proj
        yield own.out, out.weight


def _delta_norm(pair: LoraPair) -> float:
    if isinstance(pair, ParameterPair):
        return float(pair.delta().norm())
    lora_A, lora_B = (factor.detach() for factor in pair.factors())
    if not lora_A.numel() or not lora_B.any():
        return 0.0
    return factored_norm(lora_A.flatten(1), lora_B.flatten(1), pair.scaling)


def _norm(weight: Tensor | None) -> float | None:
    if weight is None or weight.is_meta:
        return None
    dense = weight.read() if isinstance(weight, PackedTensor) else weight.detach()
    return float(dense.norm(dtype=torch.float32)) if dense.is_floating_point() else None


def _plot(layers: Sequence[LayerChange], path: Path) -> str | None:
    """Draw update and last gradient of every layer over the blocks, a line for each kind of module; None without matplotlib."""
    if not layers:
        return None
    try:
        figure = make_figure("drawing the layers", figsize=(11, 4), layout="constrained")
    except MissingExtraError:
        return None
    kinds: dict[str, list[LayerChange]] = {}
    for layer in layers:
        kinds.setdefault(layer.path.rpartition(".")[2], []).append(layer)
    changes, gradients = figure.subplots(1, 2)
    for kind, some in kinds.items():
        blocks = [block_index(layer.path, None) or 0 for layer in some]
        changes.plot(blocks, [layer.share or math.nan for layer in some], marker=".", label=kind)
        last = [layer.grad_norms[-1][1] if layer.grad_norms else math.nan for layer in some]
        gradients.plot(blocks, [norm or math.nan for norm in last], marker=".", label=kind)
    changes.set(xlabel="block", ylabel="|dW| / |W|", title="how far each layer moved")
    gradients.set(xlabel="block", ylabel="norm", title="gradients at the last look")
    for axes in (changes, gradients):
        if any(line.get_ydata().size and not all(map(math.isnan, line.get_ydata())) for line in axes.get_lines()):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    changes.legend(fontsize=7)
    write_atomic(path, as_png(figure))
    return str(path)
