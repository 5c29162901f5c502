"""save_adapter(), load_adapter() and swap_adapter(): between a live model and an adapter folder.

Loading is strict: the base must be the one the adapter was trained on, and every tensor must be there, expected and of the
right shape, or nothing is attached. Swapping is loading in the place of an adapter that is there.
"""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from luthier import __version__
from luthier.adapt.attaching import PairMaker, install, reinstall, set_trainable
from luthier.adapt.loftq import minus_of
from luthier.adapt.parameters import parameter_targets
from luthier.adapt.planning import AttachPlan, PlannedLayer, base_modules, plan
from luthier.adapt.state import adapter_parameters, base_parameters, pairs_with_start, roster_of
from luthier.adapt.switching import disabled
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterFormatError, AdapterMismatchError, BaseMismatchError, TargetError
from luthier.core.methods import LOFTQ, keeps_start
from luthier.core.names import is_target, matches_name
from luthier.formats.adapter_config import converted_config, dump_config, parse_config
from luthier.formats.card import model_card
from luthier.formats.fingerprint import Comparison, Fingerprint, Verdict, compare, fingerprint
from luthier.formats.folder import AdapterFolder, read_adapter, tensor_digest, write_adapter
from luthier.formats.keys import PREFIX, canonical_keys, expected_shapes, item_key, pair_key, rows_key, whole_key, wrapped_path
from luthier.formats.note import CONFIG_FILE, TENSOR_FILE, sha256
from luthier.formats.plain_lora import plain_lora
from luthier.layers.base import own_parameters
from luthier.layers.kinds import layer_kind

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What load_adapter did: the plan that it carried out, the verdict on the base, and the folder as read."""

    name: str
    plan: AttachPlan
    base: Comparison
    folder: AdapterFolder


@dataclass(frozen=True)
class FittedAdapter:
    """An adapter held against a model that it fits: the plan, its tensors under PEFT's names, and the verdict on the base."""

    plan: AttachPlan
    tensors: dict[str, Tensor]
    base: Comparison


def save_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    base: Fingerprint | None = None,
    save_embedding_layers: bool = False,
    as_lora: bool = False,
) -> Path:
    """Write the adapter `name` to the folder `path` in PEFT's format, with its base's fingerprint and `recipe` beside it.

    `base` saves computing the fingerprint where it is known. `save_embedding_layers` adds the base's own table for adapted
    embeddings, as PEFT does by default; it is large, and only PEFT's check of it needs it. An adapter whose pairs keep what they
    began with (pissa, olora, orthogonal) is written as the plain adapter of twice the rank that it equals on the same base, and
    the recipe says so.
    One of init 'loftq' is a plain adapter for the base in 4 bits that it was attached with; where that is not what
    `quantize_linears(model)` gives, the folder holds what it takes: `quantize_linears(model, minus=read_adapter(path).minus)`.
    With `as_lora` an AdaLoRA adapter is written as the plain LoRA that computes the same, each layer with the rank that is left.
    Raises: AdapterStateError, StorageError (an adapter that was there before is intact), AdapterFormatError (not finite).
    """
    config = roster_of(model).configs.get(name)
    tensors = adapter_tensors(model, name)
    assert config is not None  # adapter_tensors has checked the name
    if as_lora:
        config, tensors = plain_lora(model, name, config)
    if save_embedding_layers:
        tensors |= _own_tables(model, name)
    config, config_text, converted = _stored_config(model, name, config)
    note = {
        "luthier": __version__,
        "base": (base or fingerprint_of(model)).model_dump(mode="json"),
        "recipe": (recipe or {}) | converted,
        "metrics": metrics or {},
    }
    return write_adapter(path, config_text, tensors, model_card(config, metrics or {}), note, minus_of(model))


def live_folder(model: nn.Module, name: str = "default", *, base: Fingerprint | None = None) -> AdapterFolder:
    """Return the adapter `name` as it is now, as `read_adapter` would read it after `save_adapter`; nothing is written.

    For an engine that is to answer with an adapter in training. Its tensors are copies. Raises: AdapterStateError.
    """
    config = roster_of(model).configs.get(name)
    tensors = adapter_tensors(model, name)
    assert config is not None  # adapter_tensors has checked the name
    _, config_text, _ = _stored_config(model, name, config)
    note = {"base": (base or fingerprint_of(model)).model_dump(mode="json")}
    digests = {CONFIG_FILE: sha256(config_text.encode()), TENSOR_FILE: tensor_digest(tensors)}
    return AdapterFolder(Path(name), parse_config(config_text, name), tensors, note, digests=digests)


def _stored_config(model: nn.Module, name: str, config: LoraConfig) -> tuple[LoraConfig, str, dict[str, Any]]:
    """Return an adapter's configuration as it is stored, its text, and what the recipe says of how it was converted for that."""
    kinds = {item.kind.word for item in adapter_parameters(model, name) if item.kind}
    config = _with_base_name(model, config)
    converted: dict[str, Any] = {}
    if keeps_start(config.init_lora_weights):
        converted = {
            "converted": {"init_lora_weights": config.init_lora_weights, "r": config.r, "form": "[B | B-B0] [A-A0 ; A0]"}
        }
        config = converted_config(config)
    if config.init_lora_weights == LOFTQ:
        converted = {"loftq": config.loftq_config}
    mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    text = dump_config(config, fan_in_fan_out="conv1d" in kinds, auto_mapping=None if config.task_type else mapping)
    return config, text, converted


def adapter_tensors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Return the adapter's tensors under their names on disk, as detached copies on the CPU."""
    items = adapter_parameters(model, name, every_name=True)
    tensors = {item_key(item): item.parameter for item in items} | _with_start(model, name)
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


def _with_start(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return the pairs that keep a start, as the plain pairs of twice the rank that they equal."""
    found: dict[str, Tensor] = {}
    for path, pair in pairs_with_start(model, name).items():
        kind = layer_kind(model.get_submodule(path))
        assert kind is not None  # it carries a pair
        lora_A, lora_B = pair.factors()
        found |= {pair_key(path, "lora_A", kind.word): lora_A, pair_key(path, "lora_B", kind.word): lora_B}
    return found


def _own_tables(model: nn.Module, name: str) -> dict[str, Tensor]:
    items = [item for item in adapter_parameters(model, name) if item.kind and item.kind.word == "embedding"]
    with disabled(model):  # a merged table is not the base's own
        return {
            whole_key(item.path, "base_layer.weight"): model.get_parameter(f"{item.path}.weight").detach().to("cpu", copy=True)
            for item in items
        }


def load_adapter(
    model: nn.Module,
    path: str | Path | AdapterFolder,
    name: str = "default",
    *,
    trainable: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Attach the adapter in the folder `path` (or one that was read already) to `model` under `name`, frozen unless `trainable`.

    The first adapter of a model becomes active. The base is compared with the one the adapter was trained on: another base
    raises BaseMismatchError unless `force`; an adapter that does not say (written by PEFT) is loaded with a warning.
    Raises: AdapterFormatError, AdapterMismatchError (every missing, unexpected and mis-shaped tensor in one message, or all
    names that this model does not have), BaseMismatchError, AdapterNameError, AdapterStateError. The model is unchanged then.
    """
    return _load(install, model, path, name, trainable=trainable, force=force, allow_pickle=allow_pickle)


def swap_adapter(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    force: bool = False,
    allow_pickle: bool = False,
) -> LoadReport:
    """Put the adapter in the folder `path` in the place of the one called `name`: its weights, its layers and its configuration.

    The model then computes what it would after a fresh load, bit for bit. Other adapters, and which ones are active at which
    weight, stay as they are. The numbers are new parameters: an optimiser that held the old ones does not see them. With the same
    layers, ranks and scaling a compiled model is not compiled again; a first change of the scaling alone costs one compilation.
    Raises: what load_adapter raises, and AdapterStateError if there is none of that name, while merged, or where modules that
    are replaced whole would meet other active adapters. The model is unchanged then.
    """
    return _load(reinstall, model, path, name, trainable=trainable, force=force, allow_pickle=allow_pickle)


Installer = Callable[[nn.Module, AttachPlan, str, PairMaker], AttachPlan]


def _load(
    put: Installer,
    model: nn.Module,
    path: str | Path | AdapterFolder,
    name: str,
    *,
    trainable: bool,
    force: bool,
    allow_pickle: bool,
) -> LoadReport:
    folder = path if isinstance(path, AdapterFolder) else read_adapter(path, allow_pickle=allow_pickle)
    fitted = fit_adapter(model, folder, force=force)
    planned, tensors = fitted.plan, fitted.tensors

    def stored_pair(planned: AttachPlan, layer: PlannedLayer, weight: Tensor) -> tuple[Tensor, ...]:
        keys = [pair_key(wrapped_path(layer), role, layer.kind.word, layer.is_adalora) for role in layer.shapes]
        return tuple(_master(tensors[key], weight.device) for key in keys)

    put(model, planned, name, stored_pair)
    with torch.no_grad():
        for item in adapter_parameters(model, name):
            if item.role in ("bias", "magnitude", "whole", "rows"):
                item.parameter.copy_(tensors[item_key(item)])
    set_trainable(model, name, trainable)
    return LoadReport(name, planned, fitted.base, folder)


def fit_adapter(
    model: nn.Module,
    folder: AdapterFolder,
    *,
    force: bool = False,
    base: Fingerprint | None = None,
    value_of: Callable[[str], Tensor] | None = None,
) -> FittedAdapter:
    """Check an adapter against `model` as load_adapter does, and attach nothing.

    A model on the meta device will do where `base` is its fingerprint and `value_of` gives its parameters by their names.
    Raises: AdapterMismatchError, BaseMismatchError, AdapterFormatError.
    """
    tensors = {key: folder.tensors[found] for found, key in canonical_keys(folder.tensors).items()}
    # The wrong base is the better explanation where both are wrong, but which tensors do not fit says it most exactly.
    planned = _fitting_plan(model, folder.config, tensors, _described(folder), value_of or model.get_parameter)
    return FittedAdapter(planned, tensors, check_base(model, folder, force=force, base=base))


def check_base(model: nn.Module, folder: AdapterFolder, *, force: bool = False, base: Fingerprint | None = None) -> Comparison:
    """Return how `model`'s base compares with the one an adapter was trained on. Raises: BaseMismatchError unless `force`.

    `base` saves taking the model's fingerprint where it is known.
    """
    verdict = compare(_trained_on(folder), base or fingerprint_of(model))
    _judge(verdict, _described(folder), force)
    return verdict


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


def _fitting_plan(
    model: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], described: str, value_of: Callable[[str], Tensor]
) -> AttachPlan:
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
    whole |= {rows_key(table.path): (len(table.tokens), table.columns) for table in planned.tables}
    expected = expected_shapes(planned, whole)
    found = {key: tensor for key, tensor in tensors.items() if key in expected or not _is_copy(key, tensors, modules, value_of)}
    faults = [f"{_short(key)} is missing" for key in expected if key not in found]
    faults += [f"{_short(key)} is not expected" for key in found if key not in expected]
    faults += [
        f"{_short(key)} is {tuple(found[key].shape)}, needs {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != shape
    ]
    for (first, key), *others in planned.ties:
        kept = found.get(whole_key(first, key))
        differing = [path for path, other in others if kept is not None and not _equal(kept, found.get(whole_key(path, other)))]
        faults += [f"{first} and {path} are trained as one (ensure_weight_tying), but differ in the file" for path in differing]
    if faults:
        shown = faults[:20] + ([f"... and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise AdapterMismatchError(
            f"{described} does not fit this model ({len(faults)} faults, {len(expected)} tensors needed):\n"
            + "\n".join(f"  {fault}" for fault in shown)
        )
    return planned


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and torch.equal(tensor, other)


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
    parameters = [entry for entry in config.target_parameters or () if parameter_targets(modules, [entry])] or None
    kept = (targets, saved, parameters)
    if kept == (config.target_modules, config.modules_to_save, config.target_parameters) or not any(kept):
        return config
    named = [*(config.target_modules if isinstance(config.target_modules, list) else ()), *(config.modules_to_save or ())]
    unknown = [entry for entry in named if not any(path.endswith(entry) for path in modules)]
    if unknown := unknown + [entry for entry in config.target_parameters or () if entry not in (parameters or ())]:
        log.warning(f"{described}: names that match nothing in this model are left out: {', '.join(map(repr, unknown))}")
    return config.changed(target_modules=targets, modules_to_save=saved, target_parameters=parameters)


def _is_copy(key: str, tensors: dict[str, Tensor], modules: dict[str, nn.Module], value_of: Callable[[str], Tensor]) -> bool:
    """Return whether a tensor that no adapter needs says nothing new, so that it may be left out.

    PEFT stores the base's own tables with adapted embeddings, with bias='all' a second copy of a bias in modules_to_save, and
    what VeLoRA and MonteCLoRA need while they train.
    """
    if re.search(r"\.lora_(velora_embed$|monteclora_sampler\.)", key):
        return True
    tensor = tensors[key]
    path, _, last = _short(key).rpartition(".")
    if path.endswith(".modules_to_save"):
        other = tensors.get(whole_key(path.removesuffix(".modules_to_save"), last))
    else:
        path = path.removesuffix(".base_layer").removesuffix(".original_module")
        is_own = path in modules and modules[path]._parameters.get(last) is not None
        other = value_of(f"{path}.{last}" if path else last) if is_own else None
    if other is None or other.shape != tensor.shape:
        return False
    other = other.detach().cpu()
    return torch.equal(other, tensor.to(other.dtype)) or torch.equal(other.to(tensor.dtype), tensor)


def _with_base_name(model: nn.Module, config: LoraConfig) -> LoraConfig:
    name = getattr(model, "name_or_path", "") or getattr(getattr(model, "config", None), "_name_or_path", "")
    if config.base_model_name_or_path or not name:
        return config
    return config.changed(base_model_name_or_path=str(name))


def _described(folder: AdapterFolder) -> str:
    return f"adapter '{folder.path.name}' (trained on {_base_name(folder)})"


def _base_name(folder: AdapterFolder) -> str:
    return folder.config.base_model_name_or_path or "a base that it does not name"


def _master(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _short(key: str) -> str:
    return key.removeprefix(PREFIX)
