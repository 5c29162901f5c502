"""Put a model into evaluation for a moment, and back exactly as it was.

Never touches weights, adapters or the autograd settings outside its `with` block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: "nn.Module") -> "Iterator[None]":
    """Evaluation mode without gradients; afterwards every module has its own earlier mode again.

    `model.train()` would not do for the way back: it also switches on the modules that someone had put to `eval()` on purpose.
    And `no_grad`, not `inference_mode`: what a module caches meanwhile must still be usable by the next training step.
    """
    import torch

    from luthier.ops.scratch import release_scratch

    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in before:
            module.training = was_training
        release_scratch()
