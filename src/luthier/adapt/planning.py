"""plan(): what attaching would do, before anything is touched. attach() carries out exactly this."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from luthier.adapt.state import adapter_prefixes
from luthier.core.config import ALL_LINEAR, LoraConfig
from luthier.core.errors import TargetError, did_you_mean
from luthier.core.lora import lora_scaling
from luthier.core.names import block_index, is_inside_saved, is_saved_whole, is_target, matches_any, matches_name, pattern_value
from luthier.layers.base import own_parameters
from luthier.layers.kinds import LayerKind, layer_kind, why_hidden, why_no_magnitude, why_not


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that gets a pair."""

    path: str
    kind: LayerKind
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    trains_bias: bool
    has_magnitude: bool = False

    @property
    def num_parameters(self) -> int:
        return self.r * (self.in_features + self.out_features) + (self.trains_bias + self.has_magnitude) * self.out_features


@dataclass(frozen=True)
class AttachPlan:
    """What an adapter would consist of. `saved` and `biases` map paths of replaced modules to their trained parameters."""

    config: LoraConfig
    layers: tuple[PlannedLayer, ...]
    saved: dict[str, int]
    biases: dict[str, int]
    num_base_parameters: int
    warnings: tuple[str, ...] = field(default=())

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(layer.num_parameters for layer in self.layers) + sum(self.saved.values()) + sum(self.biases.values())

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base's."""
        return self.num_parameters / max(1, self.num_base_parameters)

    def __str__(self) -> str:
        names = Counter((layer.path.rsplit(".", 1)[-1], layer.in_features, layer.out_features, layer.r) for layer in self.layers)
        lines = [f"{self.num_parameters:,} of {self.num_base_parameters:,} parameters are trained ({self.share:.2%})"]
        for (name, in_features, out_features, r), count in names.items():
            each = r * (in_features + out_features) + self.config.use_dora * out_features
            lines.append(f"  {count:4d} x {name:16s} {in_features} -> {out_features}, r={r}: {each:,} each")
        lines += [f"  saved whole: {path} ({count:,})" for path, count in self.saved.items()]
        if self.biases:
            lines.append(f"  {len(self.biases)} more biases ({sum(self.biases.values()):,})")
        lines += [f"  note: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def plan(model: nn.Module, config: LoraConfig) -> AttachPlan:
    """Return what `attach(model, config)` would adapt and how many parameters that trains. Touches nothing.

    Raises: TargetError if a target matches nothing (with near misses) or names a layer that cannot be adapted.
    """
    modules = base_modules(model)
    given, config = config, resolve_all_linear(model, modules, config)
    saved = {path: _count(module) for path, module in modules.items() if path and is_saved_whole(config, path)}
    faults = _saved_faults(modules, saved)
    layers = []
    for path, module in modules.items():
        if not path or not is_target(config, path):
            continue
        kind = layer_kind(module)
        if kind is None:
            faults.append(f"{path} is a {_class_name(module)}; only Linear, Embedding and Conv1D layers can be adapted")
        elif reason := why_not(module, modules[path.rpartition(".")[0]]) or (config.use_dora and why_no_magnitude(module)):
            faults.append(f"{path}: {reason}")
        elif whole := _holder(path, saved):
            faults.append(f"{path} lies in {whole}, which modules_to_save replaces; name in modules_to_save only what it should")
        else:
            layers.append(_planned(config, path, module, kind))
    faults += _unmatched(config, modules)
    biases = {}
    if config.bias == "all":
        paired = {layer.path for layer in layers}
        for path, module in modules.items():
            bias = module._parameters.get("bias")
            if not path or bias is None or path in paired or _holder(path, saved):
                continue
            if reason := why_hidden(module, modules[path.rpartition(".")[0]]):
                faults.append(f"bias='all' trains the bias of {path}: {reason}")
            biases[path] = bias.numel()
    if faults:
        raise TargetError(_listed(f"the configuration does not fit this {_class_name(model)} ({len(faults)} faults)", faults))
    return AttachPlan(
        config, tuple(layers), saved, biases, _count(model), _warnings(model, modules, given, config, layers, saved)
    )


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return path -> module of the model itself, without what adapters added to it."""
    inside = adapter_prefixes(model)
    return {path: module for path, module in model.named_modules() if not f"{path}.".startswith(inside)}


def resolve_all_linear(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> LoraConfig:
    """Return `config` with 'all-linear' written out: every linear layer but the output head, as PEFT does."""
    if not isinstance(config.target_modules, str) or config.target_modules.lower() != ALL_LINEAR:
        return config
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head else None
    heads = {id(head)} if head is not None else {id(getattr(model, name, None)) for name in ("score", "classifier")}
    admitted = {
        path: module
        for path, module in modules.items()
        if path and not matches_any(config.exclude_modules, path) and not is_inside_saved(config, path)
    }
    linear = [
        path
        for path, module in admitted.items()
        if is_linear(module) and id(module) not in heads and not why_not(module, modules[path.rpartition(".")[0]])
    ]
    if not linear:
        raise TargetError(f"target_modules='{ALL_LINEAR}' found no linear layer that can be adapted in this {_class_name(model)}")
    return LoraConfig(**(dict(config) | {"target_modules": _shortest_names(linear, admitted)}))


def is_linear(module: nn.Module) -> bool:
    """Return whether 'all-linear' means this kind of module."""
    kind = layer_kind(module)
    return kind is not None and kind.word != "embedding"


def _shortest_names(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Return the fewest last parts that match exactly `paths`, so that files list `q_proj` and not 210 paths."""
    wanted = set(paths)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    exact = [name for name in names if not name.isdigit() and all(path in wanted for path in modules if matches_name(name, path))]
    covered = {path for path in paths if any(matches_name(name, path) for name in exact)}
    return exact + sorted(wanted - covered)


def _planned(config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> PlannedLayer:
    r = pattern_value(config.rank_pattern, path, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    in_features, out_features = kind.sizes(module)
    trains_bias = config.bias != "none" and getattr(module, "bias", None) is not None
    scaling = lora_scaling(r, lora_alpha, config.use_rslora)
    return PlannedLayer(path, kind, in_features, out_features, r, lora_alpha, scaling, trains_bias, config.use_dora)


def _unmatched(config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    adaptable = [path for path, module in modules.items() if path and layer_kind(module)]
    names = sorted({path.rsplit(".", 1)[-1] for path in adaptable})
    faults = []
    if isinstance(config.target_modules, str):
        if not any(is_target(config, path) for path in modules):
            faults.append(f"target_modules={config.target_modules!r} matches no module. Layers here: {', '.join(names)}")
    else:
        for entry in config.target_modules:
            matched = [path for path in modules if matches_name(entry, path)]
            if not any(is_target(config, path) for path in matched):
                what = f"target_modules entry {entry!r}"
                faults.append(
                    f"{what} matches only what is excluded, saved whole or outside layers_to_transform"
                    if matched
                    else f"{what} matches nothing.{did_you_mean(entry, [*names, *adaptable])} Layers here: {', '.join(names)}"
                )
    for entry in config.modules_to_save or ():
        if not any(path.endswith(entry) for path in modules):
            known = {path.rsplit(".", 1)[-1] for path in modules if path}
            faults.append(f"modules_to_save entry {entry!r} matches nothing.{did_you_mean(entry, known)}")
    return faults


def _saved_faults(modules: dict[str, nn.Module], saved: dict[str, int]) -> list[str]:
    faults = []
    for path in saved:
        if reason := why_hidden(modules[path], modules[path.rpartition(".")[0]]):
            faults.append(f"modules_to_save: {path}: {reason}")
        if whole := _holder(path.rpartition(".")[0], saved):
            faults.append(f"modules_to_save: {path} lies in {whole}, which is saved whole already")
        if not any(True for _ in own_parameters(modules[path])):
            faults.append(f"modules_to_save: {path} has no parameters to train")
    return faults


def _holder(path: str, saved: dict[str, int]) -> str | None:
    """Return the module of `saved` that `path` is or lies in."""
    return next((whole for whole in saved if f"{path}.".startswith(f"{whole}.")), None)


def _warnings(
    model: nn.Module,
    modules: dict[str, nn.Module],
    given: LoraConfig,
    config: LoraConfig,
    layers: list[PlannedLayer],
    saved: dict[str, int],
) -> tuple[str, ...]:
    found = [*_without_effect(modules, config, layers), *_left_out(modules, given)]
    for paths in _tied_modules(model).values():
        touched = [path for path in paths if path in saved or any(layer.path == path for layer in layers)]
        if touched and len(paths) > 1:
            others = [path for path in paths if path not in touched]
            found.append(
                f"{' and '.join(paths)} share one weight; the adapter changes {' and '.join(touched)}"
                + (f" and leaves {' and '.join(others)} as the base has it" if others else ", each by its own update")
                + ". A merge gives each its own copy."
            )
    return tuple(found)


def _without_effect(modules: dict[str, nn.Module], config: LoraConfig, layers: list[PlannedLayer]) -> Iterator[str]:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for expression in getattr(config, field_name):
            if not any(pattern_value({expression: True}, layer.path, False) for layer in layers):
                yield f"{field_name} key {expression!r} matches no adapted layer and has no effect"
    excluded = config.exclude_modules or []
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        if not any(matches_any(excluded if isinstance(excluded, str) else [entry], path) for path in modules):
            yield f"exclude_modules entry {entry!r} matches nothing and has no effect"
    chosen = config.layers_to_transform
    for index in [chosen] if isinstance(chosen, int) else chosen or []:
        if not any(block_index(layer.path, config.layers_pattern) == index for layer in layers):
            yield f"layers_to_transform index {index} matches no adapted layer and has no effect"
    if config.bias == "lora_only" and layers and not any(layer.trains_bias for layer in layers):
        yield "bias='lora_only' has no effect: no adapted layer has a bias"
    if config.lora_dropout and any(layer.kind.word == "embedding" for layer in layers):
        yield "lora_dropout has no effect on embedding layers"


def _left_out(modules: dict[str, nn.Module], given: LoraConfig) -> Iterator[str]:
    """Say which linear layers 'all-linear' leaves out because they cannot be adapted."""
    if not isinstance(given.target_modules, str) or given.target_modules.lower() != ALL_LINEAR:
        return
    reasons = {
        path: reason
        for path, module in modules.items()
        if path and is_linear(module) and (reason := why_not(module, modules[path.rpartition(".")[0]]))
    }
    if reasons:
        path, reason = next(iter(reasons.items()))
        yield f"'{ALL_LINEAR}' leaves out {len(reasons)} layer(s) that cannot be adapted, such as {path}: {reason}"


def _tied_modules(model: nn.Module) -> dict[int, list[str]]:
    """Return parameter id -> paths of the modules that hold it."""
    tied: dict[int, list[str]] = {}
    for path, module in base_modules(model).items():
        for parameter in module._parameters.values():
            if parameter is not None:
                tied.setdefault(id(parameter), []).append(path)
    return tied


def _count(module: nn.Module) -> int:
    return sum({id(parameter): parameter.numel() for parameter in own_parameters(module)}.values())


def _class_name(module: nn.Module) -> str:
    return getattr(module, "base_class", type(module)).__name__


def _listed(head: str, faults: list[str]) -> str:
    shown = faults[:10] + ([f"... and {len(faults) - 10} more"] if len(faults) > 10 else [])
    return f"{head}:\n" + "\n".join(f"  {fault}" for fault in shown)
