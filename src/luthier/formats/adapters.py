"""save_adapter() and load_adapter(): between a live model and an adapter folder.

Loading is strict: the base must be the one the adapter was trained on, and every tensor must be there, expected and of the
right shape, or nothing is attached.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from luthier import __version__
from luthier.adapt.attaching import install, set_trainable
from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan
from luthier.adapt.state import adapter_parameters, base_parameters, roster_of
from luthier.adapt.switching import disabled
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError, AdapterMismatchError, BaseMismatchError, TargetError
from luthier.core.names import is_target, matches_name
from luthier.formats.adapter_config import dump_config
from luthier.formats.card import model_card
from luthier.formats.fingerprint import Comparison, Fingerprint, Verdict, compare, fingerprint
from luthier.formats.folder import AdapterFolder, read_adapter, write_adapter
from luthier.formats.keys import PREFIX, canonical_keys, expected_shapes, item_key, pair_key, whole_key
from luthier.layers.base import own_parameters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What load_adapter did: the plan that it carried out, the verdict on the base, and the folder as read."""

    name: str
    plan: AttachPlan
    base: Comparison
    folder: AdapterFolder


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    base: Fingerprint | None = None,
    save_embedding_layers: bool = False,
) -> Path:
    """Write the adapter `name` to the folder `path` in PEFT's format, with its base's fingerprint and `recipe` beside it.

    `base` saves computing the fingerprint where it is known. `save_embedding_layers` adds the base's own table for adapted
    embeddings, as PEFT does by default; it is large, and only PEFT's check of it needs it.
    Raises: AdapterStateError, StorageError (an adapter that was there before is intact), AdapterFormatError (not finite).
    """
    config = roster_of(model).configs.get(name)
    tensors = adapter_tensors(model, name)
    assert config is not None  # adapter_tensors has checked the name
    kinds = {item.kind.word for item in adapter_parameters(model, name) if item.kind}
    if save_embedding_layers:
        tensors |= _own_tables(model, name)
    config = _with_base_name(model, config)
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    config_text = dump_config(config, fan_in_fan_out="conv1d" in kinds, auto_mapping=None if config.task_type else mapping)
    note = {
        "luthier": __version__,
        "base": (base or fingerprint_of(model)).model_dump(mode="json"),
        "recipe": recipe or {},
        "metrics": metrics or {},
    }
    return write_adapter(path, config_text, tensors, model_card(config, metrics or {}), note)


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors under their names on disk, as detached copies on the CPU."""
    return {item_key(item): item.parameter.detach().to("cpu", copy=True) for item in adapter_parameters(model, name)}


def _own_tables(model: nn.Module, name: str) -> dict[str, Tensor]:
    items = [item for item in adapter_parameters(model, name) if item.kind and item.kind.word == "embedding"]
    with disabled(model):  # a merged table is not the base's own
        return {
            whole_key(item.path, "base_layer.weight"): model.get_parameter(f"{item.path}.weight").detach().to("cpu", copy=True)
            for item in items
        }


def load_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Attach the adapter in the folder `path` to `model` under `name`, frozen unless `trainable`.

    The first adapter of a model becomes active. The base is compared with the one the adapter was trained on: another base
    raises BaseMismatchError unless `force`; an adapter that does not say (written by PEFT) is loaded with a warning.
    Raises: AdapterFormatError, AdapterMismatchError (every missing, unexpected and mis-shaped tensor in one message, or all
    names that this model does not have), BaseMismatchError, AdapterNameError, AdapterStateError. The model is unchanged then.
    """
    folder = read_adapter(path, allow_pickle=allow_pickle)
    tensors = {key: folder.tensors[found] for found, key in canonical_keys(folder.tensors).items()}
    trained_on = _trained_on(folder)
    described = f"adapter '{folder.path.name}' (trained on {_base_name(folder)})"
    # The wrong base is the better explanation where both are wrong, but which tensors do not fit says it most exactly.
    planned = _fitting_plan(model, folder.config, tensors, described)
    verdict = compare(trained_on, fingerprint_of(model))
    _judge(verdict, described, force)

    def stored_pair(planned: AttachPlan, layer: PlannedLayer, device: torch.device) -> tuple[Tensor, Tensor]:
        return (
            _master(tensors[pair_key(layer.path, "lora_A", layer.kind.word)], device),
            _master(tensors[pair_key(layer.path, "lora_B", layer.kind.word)], device),
        )

    install(model, planned, name, stored_pair)
    with torch.no_grad():
        for item in adapter_parameters(model, name):
            if item.role in ("bias", "magnitude", "whole"):
                item.parameter.copy_(tensors[item_key(item)])
    set_trainable(model, name, trainable)
    return LoadReport(name, planned, verdict, folder)


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """Return the fingerprint of a live model's base weights, whatever is attached or merged."""
    config: Any = getattr(model, "config", None)
    return fingerprint(base_parameters(model), config.to_dict() if hasattr(config, "to_dict") else {})


def _trained_on(folder: AdapterFolder) -> Fingerprint | None:
    if not folder.note.get("base"):
        return None
    try:
        return Fingerprint.model_validate(folder.note["base"])
    except ValidationError as error:
        raise AdapterFormatError(f"{folder.path}: the fingerprint of the base in luthier.json is damaged: {error}") from error


def _judge(verdict: Comparison, described: str, force: bool) -> None:
    if verdict.verdict is Verdict.MISMATCH:
        message = f"{described} was trained on another base: {verdict.reason}"
        if not force:
            raise BaseMismatchError(f"{message}\nLoad it on its own base, or pass force=True (--force) if you know that it fits.")
        log.warning(f"forced: {message}")
    elif verdict.verdict is Verdict.UNKNOWN:
        log.warning(f"{described}: cannot tell whether this is its base: {verdict.reason}")


def _fitting_plan(model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], described: str) -> AttachPlan:
    modules = base_modules(model)
    effective = _with_effect(config, modules, described)
    try:
        planned = plan(model, effective)
    except TargetError as error:
        raise AdapterMismatchError(f"{described} does not fit this model: {error}") from error
    if effective is not config:
        planned = replace(planned, config=config)  # saved again, the adapter has the configuration it came with
    whole: dict[str, tuple[int, ...]] = {}
    for path in planned.saved:
        own = {id(parameter) for parameter in own_parameters(modules[path])}
        for key, parameter in modules[path].named_parameters():
            if id(parameter) in own:
                whole[whole_key(path, key)] = tuple(parameter.shape)
    whole |= {whole_key(path, "bias"): (count,) for path, count in planned.biases.items()}
    expected = expected_shapes(planned, whole)
    found = {key: tensor for key, tensor in tensors.items() if key in expected or not _is_copy(key, tensors, modules)}
    faults = [f"{_short(key)} is missing" for key in expected if key not in found]
    faults += [f"{_short(key)} is not expected" for key in found if key not in expected]
    faults += [
        f"{_short(key)} is {tuple(found[key].shape)}, needs {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    if faults:
        shown = faults[:20] + ([f"... and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise AdapterMismatchError(
            f"{described} does not fit this model ({len(faults)} faults, {len(expected)} tensors needed):\n"
            + "\n".join(f"  {fault}" for fault in shown)
        )
    return planned


def _with_effect(config: LoraConfig, modules: dict[str, nn.Module], described: str) -> LoraConfig:
    """Return `config` without the names that have no effect on this model, unless none is left.

    attach() refuses such names. A file may have them: PEFT takes lists that name the layers of several architectures, and
    writes 'all-linear' out before it excludes anything. The tensors say whether something is missing.
    """
    targets, saved = config.target_modules, config.modules_to_save
    if isinstance(targets, list):
        targets = [entry for entry in targets if any(matches_name(entry, path) and is_target(config, path) for path in modules)]
    if saved:
        saved = [entry for entry in saved if any(path.endswith(entry) for path in modules)]
    if (targets, saved) == (config.target_modules, config.modules_to_save) or not (targets or saved):
        return config
    named = [*(config.target_modules if isinstance(config.target_modules, list) else ()), *(config.modules_to_save or ())]
    if unknown := [entry for entry in named if not any(path.endswith(entry) for path in modules)]:
        log.warning(f"{described}: names that match nothing in this model are left out: {', '.join(map(repr, unknown))}")
    return LoraConfig(**(dict(config) | {"target_modules": targets, "modules_to_save": saved}))


def _is_copy(key: str, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> bool:
    """Return whether a tensor that no adapter needs says nothing new, so that it may be left out.

    PEFT stores the base's own tables with adapted embeddings, and with bias='all' a second copy of a bias in modules_to_save.
    """
    tensor = tensors[key]
    path, _, last = _short(key).rpartition(".")
    if path.endswith(".modules_to_save"):
        other = tensors.get(whole_key(path.removesuffix(".modules_to_save"), last))
    else:
        module = modules.get(path.removesuffix(".base_layer").removesuffix(".original_module"))
        other = module._parameters.get(last) if module is not None else None
    if other is None or other.shape != tensor.shape:
        return False
    other = other.detach().cpu()
    return torch.equal(other, tensor.to(other.dtype)) or torch.equal(other.to(tensor.dtype), tensor)


def _with_base_name(model: nn.Module, config: LoraConfig) -> LoraConfig:
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if config.base_model_name_or_path or not name:
        return config
    return LoraConfig(**(dict(config) | {"base_model_name_or_path": str(name)}))


def _base_name(folder: AdapterFolder) -> str:
    return folder.config.base_model_name_or_path or "a base that it does not name"


def _master(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _short(key: str) -> str:
    return key.removeprefix(PREFIX)
