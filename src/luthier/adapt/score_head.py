"""The head of a reward model: one score for a whole conversation, beside the head that predicts tokens.

Its name, shape and place are those of transformers' ...ForSequenceClassification(num_labels=1), so an adapter that saves it
(modules_to_save) loads there through PEFT. It is no part of the base: fingerprints leave it out.
"""

import torch
from torch import nn

from luthier.core.config import LoraConfig
from luthier.core.errors import ModelError

SCORE = "score"
TASK = "SEQ_CLS"


class ScoreHead(nn.Linear):
    """One score, a product of the last hidden state: weight (1, I), no bias."""


def add_score_head(model: nn.Module, *, seed: int = 0) -> None:
    """Give `model` a `score` module, a ScoreHead with small random weights; one that is there already stays.

    Raises: ModelError if the model has something else of that name, or no hidden size in its configuration.
    """
    present = getattr(model, SCORE, None)
    if isinstance(present, ScoreHead):
        return
    config = getattr(model, "config", None)
    width = getattr(config.get_text_config(), "hidden_size", None) if config is not None else None
    if present is not None or not width:
        raise ModelError(
            f"{type(model).__name__} cannot get a score head: it has a {SCORE!r} of its own, or tells no hidden_size"
        )
    body = next(model.parameters())
    head = ScoreHead(width, 1, bias=False, device=body.device, dtype=body.dtype if body.is_floating_point() else None)
    spread = getattr(config, "initializer_range", None) or 0.02
    with torch.no_grad():
        head.weight.copy_(spread * torch.randn(1, width, generator=torch.Generator().manual_seed(seed)))
    head.train(model.training)
    setattr(model, SCORE, head)


def scoring_config(lora: LoraConfig) -> LoraConfig:
    """Return the configuration of an adapter that trains and saves the score head too, as PEFT names such a one."""
    saved = list(lora.modules_to_save or ())
    return lora.changed(modules_to_save=saved if SCORE in saved else [*saved, SCORE], task_type=TASK)
