"""From a loaded model to a decoder of our own, compared with the model before it is believed.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from luthier.core.errors import ConfigError
from luthier.engine.decoder import Decoder
from luthier.engine.layouts import Layout, UnknownLayoutError, layout_of
from luthier.engine.modes import evaluating
from luthier.engine.runner import Piece, Runner
from luthier.ops.placement import device_kind
from luthier.ops.prepacked import Form
from luthier.ops.products import fast_products

PROBE = 11
"""Tokens of the comparison: some in one piece, some in a second one, some one by one."""

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""How far logits may be from the model's, relative in norm, by the dtype the model is kept in."""


def decoder_for(model: Any, form: Form = "float") -> Decoder:
    """Return the engine's decoder for a transformers model without adapters, in the dtype that multiplies fast on its device.

    With another `form` of weights it is compared with the model holding those same, coarser weights. A model that is in NF4
    already keeps its codes as "nf4", and is widened once as "float".

    Raises: UnknownLayoutError if the architecture is not known, or if the two do not give the same numbers; ConfigError for a
    form that this model or its device cannot have.
    """
    layout = layout_of(model)
    if layout.is_packed and form in ("int8", "int4"):
        raise ConfigError(
            f"this base is in NF4 already, and form={form!r} would round its weights a second time. Write 'nf4' (as they are "
            "stored) or 'float' (widened once: more memory, faster), or load the base without quantize"
        )
    kind = device_kind(layout.embedding.device)
    if kind != "cpu" and form in ("int8", "int4"):
        raise ConfigError(f"form={form!r} is there for CPUs, and this model is on {kind}. Write 'float' or 'nf4'")
    with evaluating(model), torch.inference_mode():
        decoder = Decoder(layout, fast_products(layout.embedding), form)
        with _as_laid_out(layout, decoder, form):
            _compare(model, decoder, TOLERANCE[torch.bfloat16 if form != "float" else decoder.kept_in])
    return decoder


@contextmanager
def _as_laid_out(layout: Layout, decoder: Decoder, form: Form) -> Iterator[None]:
    """Inside the block the model has the weights of the decoder, if those are other ones."""
    has_others = form != "float" and not layout.is_packed
    coarser = [projection for block in layout.blocks for projection in block.projections] if has_others else []
    paths = [(path, weight) for each in coarser for path, weight in zip(each.paths, each.weights, strict=True)]
    originals = [weight.clone() for _, weight in paths]
    try:
        for path, weight in paths:
            weight.copy_(decoder.weight(path))
        yield
    finally:
        for (_, weight), original in zip(paths, originals, strict=True):
            weight.copy_(original)


def _compare(model: Any, decoder: Decoder, limit: float) -> None:
    vocabulary = decoder.layout.embedding.shape[0]
    ids = torch.arange(PROBE) * 7919 % vocabulary
    wanted = model(input_ids=ids[None].to(decoder.device), use_cache=False).logits[0].float()
    runner = Runner(decoder)
    runner.open("probe", (), ids.tolist(), PROBE)
    found: list[Tensor] = []
    rows = []
    for start, stop in ((0, 5), (5, 8), *((each, each + 1) for each in range(8, PROBE))):
        found.append(runner.step([Piece("probe", ids[start:stop].tolist())]).logits[0])
        rows.append(stop - 1)
    found_TV, wanted_TV = torch.stack(found), wanted[rows]
    error = float((found_TV - wanted_TV).norm() / wanted_TV.norm().clamp_min(1e-30))
    if not error <= limit:
        raise UnknownLayoutError(f"the engine's forward differs from the model's by {error:.1e} (at most {limit:g})")
