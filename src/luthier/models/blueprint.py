"""A model's shapes without its numbers: its configuration, and the modules that follow from it on the meta device.

No weights are read, and from the Hub nothing but config.json is fetched.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.models.fetch import pull
from luthier.models.spec import SpecKind, parse_spec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def read_config(text: str) -> "PreTrainedConfig":
    """Return the configuration of the base model `text`: a config.json, or whatever `parse_spec` knows.

    Raises: ModelError if there is none, or if transformers does not know its model type.
    """
    from transformers import AutoConfig

    path, revision = Path(text).expanduser(), None
    if path.suffix != ".json":
        spec = parse_spec(text)
        if spec.kind is SpecKind.HUB:
            path, revision = Path(spec.name), spec.version or None
        else:
            path = pull(spec)
    elif not path.is_file():
        raise ModelError(f"There is no file {text!r}. Name a config.json, or the folder that holds it.")
    elif "model_type" not in _json(path):
        raise ModelError(f"{text} is not a model's config.json: it names no model_type.")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"The configuration of {text} cannot be read: {error}") from error
    return config


def meta_model(config: "PreTrainedConfig", dtype: "torch.dtype") -> "PreTrainedModel":
    """Return the causal language model of `config` on the meta device, in training mode.

    Of a model with a vision or speech part that is the text part alone. Raises: ModelError if there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = config.get_text_config(decoder=True)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"No causal language model follows from this {type(config).__name__}: {error}") from error
    return model.train()


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}
