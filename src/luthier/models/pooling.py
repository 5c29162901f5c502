"""How a base folder says that its hidden states become one vector: sentence-transformers' files beside the weights.

    modules.json                the steps: the model, Pooling, perhaps Normalize
    1_Pooling/config.json       which tokens count, and how

Anything else in there (a dense layer, sums weighted by place) is not known here, and so refused: without it the vectors would be
others than those that the model was trained to give.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import ModelError

PoolingKind = Literal["mean", "last", "first"]
"""All tokens alike, the last one, or the first one ("cls")."""

MODES: dict[str, PoolingKind] = {"mean_tokens": "mean", "lasttoken": "last", "cls_token": "first"}
NAMES: dict[str, PoolingKind] = {"mean": "mean", "lasttoken": "last", "cls": "first"}
"""Older files have a switch pooling_mode_..., newer ones the name in `pooling_mode`."""


@dataclass(frozen=True)
class Pooling:
    """How the last hidden states of a text become its vector; `normalize` to length 1."""

    kind: PoolingKind
    normalize: bool


def read_pooling(folder: Path) -> Pooling:
    """Return how the model in a folder pools. Raises: ModelError where its files do not say, or say what is not known here."""
    steps = _json(folder / "modules.json")
    if steps is None:
        raise ModelError(f"there is no modules.json in {folder}, as sentence-transformers writes it to say how a model pools")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ModelError(f"{folder / 'modules.json'} is no list of steps")
    named = [(str(step.get("type", "")).rpartition(".")[2], str(step.get("path", ""))) for step in steps]
    kinds = [kind for kind, _ in named]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ModelError(
            f"{folder / 'modules.json'} has the steps {', '.join(kinds)}; known are Transformer, Pooling and Normalize"
        )
    return Pooling(_kind(folder / named[1][1] / "config.json"), normalize=kinds[-1] == "Normalize")


def _kind(path: Path) -> PoolingKind:
    config = _json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} is missing, or no object: it should say how the model pools")
    on = [
        name.removeprefix("pooling_mode_") for name, value in config.items() if name.startswith("pooling_mode_") and value is True
    ]
    known = (
        {NAMES.get(config["pooling_mode"])} if isinstance(config.get("pooling_mode"), str) else {MODES.get(name) for name in on}
    )
    if len(known) != 1 or None in known:
        given = config.get("pooling_mode") or ", ".join(on) or "nothing"
        raise ModelError(f"{path} pools by {given}; known are mean, last token and cls, one of them")
    kind = known.pop()
    assert kind is not None
    return kind


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
