"""The yardstick: the same rows and the same loop, with every weight trained instead of pairs.

A full fine-tune is an adapter too, one that replaces every module whole: what saves, resumes, judges and merges adapters does so
here. What it costs beyond a plain full fine-tune is the base, which is kept beside the copy that is trained.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from luthier.adapt.packing import has_packed_layers
from luthier.adapt.planning import base_modules, shortest_names
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError
from luthier.models.blueprint import read_config
from luthier.models.packed import declared_packing
from luthier.train.settings import TASK, RunSettings

FULL = "full"
IN_4_BITS = (
    "a full fine-tune trains every weight, and weights in 4 bits cannot be trained; name the float model, and for a comparison "
    "with pairs let both begin there: luthier baseline ... -s model=NAME -s quantize=none"
)


def whole_model(model: nn.Module) -> LoraConfig:
    """Return the configuration of an adapter that replaces every module of `model` that has parameters of its own.

    Weights that the model shares (a tied head) stay shared.
    """
    if has_packed_layers(model):
        raise ConfigError(IN_4_BITS)
    if model._parameters:
        raise ConfigError(f"{type(model).__name__} has parameters outside its modules; train.full cannot replace those")
    modules = base_modules(model)
    holders = [path for path, module in modules.items() if any(own is not None for own in module._parameters.values())]
    holders = [path for path in holders if not any(path.startswith(f"{other}.") for other in holders)]
    owned = [id(own) for path in holders for own in modules[path].parameters()]
    names = shortest_names(holders, modules)
    if any(path.endswith(name) for path in modules.keys() - holders for name in names):  # PEFT matches ends of whole paths
        names = holders
    is_tied = len(set(owned)) < len(owned)
    values = {"target_modules": [], "modules_to_save": names, "ensure_weight_tying": is_tied, "task_type": TASK}
    return LoraConfig.model_validate(values)


def check_floats(model: str) -> None:
    """Raise ConfigError if the files of the base `model` hold weights in 4 bits; nothing but its configuration is read."""
    if declared_packing(read_config(model)) is not None:
        raise ConfigError(f"{model} holds weights in 4 bits: {IN_4_BITS}")


def contenders(settings: RunSettings, ranks: Sequence[int], full_learning_rate: float) -> dict[str, RunSettings]:
    """Return name -> settings of the full fine-tune and of the run in `settings` at each of `ranks`, in folders below its own.

    Raises: ConfigError where the run chooses ranks in another way, or the same rank is named twice.
    """
    if len(set(ranks)) < len(ranks) or not ranks:
        raise ConfigError(f"ranks must be given, each once; given: {list(ranks)}")
    if settings.lora.rank_pattern or isinstance(settings.lora, AdaLoraConfig):
        raise ConfigError(
            "ranks are set by lora.r here, so rank_pattern and AdaLoRA, which choose ranks themselves, are left out"
        )
    if not settings.data.eval_path and not settings.data.eval_fraction:
        raise ConfigError("there is nothing to compare by: set data.eval_path or data.eval_fraction")
    if settings.quantize != "none":
        raise ConfigError(f"quantize is {settings.quantize!r}: {IN_4_BITS}")
    if settings.train.full:
        raise ConfigError("train.full is what the baseline adds by itself; leave it out")
    scale = settings.lora.lora_alpha / settings.lora.r
    found = {}
    for r in ranks:
        pairs = settings.lora.changed(r=r, lora_alpha=scale * r)
        found[f"r{r}"] = settings.changed(lora=pairs, out=str(Path(settings.out, f"r{r}")))
    plain = {"learning_rate": full_learning_rate, "full": True, "freeze_A": False, "loraplus_lr_ratio": None}
    found[FULL] = settings.changed(
        lora=RunSettings.model_fields["lora"].get_default(call_default_factory=True),
        train=settings.train.changed(**plain, loraplus_lr_embedding=None),
        out=str(Path(settings.out, FULL)),
    )
    return found
