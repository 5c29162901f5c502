"""Which parameters are trained, and how fast each: AdamW's groups. LoRA+ and LoRA-FA are settings of this file alone.

LoRA+ (Hayou et al. 2024, arXiv:2402.12354): B learns at `loraplus_lr_ratio` times the rate of A.
LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A stays as it began, and only B is trained, by the gradient of the loss,
    dL/dB = scaling * G A^T        G: (O, I), the gradient of the layer's dense weight

A later version of that paper, and PEFT, multiply it by (A A^T)^-1 / scaling^2: a step of plain gradient descent on B then
moves the dense weight along G as well as A allows. Under AdamW the factor drops out, since each entry is divided by its own
size, and the inverse does little: A's random rows are nearly orthogonal (r=16, 576 inputs, kaiming: the two gradients have a
cosine of 0.988, and 90 % of their signs agree). So the gradient of the loss is taken as it is.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from luthier.adapt.state import AdapterParameter
from luthier.core.errors import ConfigError
from luthier.train.settings import TrainSettings

log = logging.getLogger(__name__)

LORAPLUS_LR_EMBEDDING = 1e-6


def freeze_lora_A(items: Iterable[AdapterParameter]) -> int:
    """Take every lora_A out of training, and return how many numbers that are.

    Raises: ConfigError where one is zero, as in an embedding: with A at zero and frozen, the update would stay zero.
    """
    frozen = [item for item in items if item.factor == "lora_A"]
    if zero := [item.path for item in frozen if not item.parameter.any()]:
        raise ConfigError(
            f"train.freeze_A would keep lora_A of {', '.join(zero)} at zero, where it begins, and so the whole update; "
            "leave these layers out of lora.target_modules, or train A too"
        )
    for item in frozen:
        item.parameter.requires_grad_(False)
    return sum(item.parameter.numel() for item in frozen)


def parameter_groups(items: Iterable[AdapterParameter], settings: TrainSettings) -> list[dict[str, Any]]:
    """Return AdamW's groups of what is trained; each has `lr_ratio`, its rate as a multiple of the schedule's.

    One group, or with LoRA+ those of its authors: A and whole matrices; pairs of embeddings, at a rate of their own; B; biases
    and other single rows, at B's rate and without decay.
    """
    rate, decay, ratio = settings.learning_rate, settings.weight_decay, settings.loraplus_lr_ratio
    trained = [item for item in items if item.parameter.requires_grad]
    if ratio is None:
        return [_group(trained, rate, 1.0, decay)]
    embedding_rate = settings.loraplus_lr_embedding or LORAPLUS_LR_EMBEDDING
    kinds: dict[str, list[AdapterParameter]] = {"A": [], "embedding": [], "B": [], "row": []}
    for item in trained:
        kinds[_kind(item)].append(item)
    if settings.loraplus_lr_embedding and not kinds["embedding"]:
        log.warning("train.loraplus_lr_embedding has no effect: no embedding is adapted")
    return [
        _group(kinds["A"], rate, 1.0, decay),
        _group(kinds["embedding"], embedding_rate, embedding_rate / rate, decay),
        _group(kinds["B"], rate * ratio, ratio, decay),
        _group(kinds["row"], rate * ratio, ratio, 0.0),
    ]


def _kind(item: AdapterParameter) -> str:
    if item.kind is not None and item.kind.word == "embedding":
        return "embedding"
    if item.parameter.ndim == 1:
        return "row"
    return "B" if item.factor == "lora_B" else "A"


def _group(items: list[AdapterParameter], rate: float, lr_ratio: float, weight_decay: float) -> dict[str, Any]:
    return {"params": [item.parameter for item in items], "lr": rate, "lr_ratio": lr_ratio, "weight_decay": weight_decay}


def gradient_norms(items: Sequence[AdapterParameter]) -> dict[str, float]:
    """Return path -> norm of the gradients of all that is trained there. A parameter without a gradient counts as nothing."""
    squares: dict[str, float] = {}
    for item in items:
        gradient = item.parameter.grad
        value = 0.0 if gradient is None else float(gradient.detach().norm(dtype=torch.float32)) ** 2
        squares[item.path] = squares.get(item.path, 0.0) + value
    return {path: math.sqrt(square) for path, square in squares.items()}
