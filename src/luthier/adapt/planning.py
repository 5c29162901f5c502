"""plan(): what attaching would do, before anything is touched. attach() carries out exactly this."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from luthier.adapt.parameters import FoundParameter, find_parameters, holder, inside_owner
from luthier.adapt.state import adapter_prefixes
from luthier.core.adalora import adalora_scaling
from luthier.core.config import ALL_LINEAR, AdaLoraConfig, LoraConfig
from luthier.core.errors import TargetError, did_you_mean
from luthier.core.lora import lora_scaling
from luthier.core.methods import needs_linear, why_no_start
from luthier.core.names import block_index, is_inside_saved, is_saved_whole, is_target, matches_any, matches_name, pattern_value
from luthier.layers.base import own_parameters
from luthier.layers.kinds import (
    PARAMETER,
    LayerKind,
    layer_kind,
    parameter_kind,
    why_hidden,
    why_no_magnitude,
    why_not,
)


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that gets a pair, or one parameter: `path` is then that of the module which owns it.

    `depth` is how many later parameters of the same module get one too; PEFT's names of their tensors follow it.
    """

    path: str
    kind: LayerKind
    in_features: int
    out_features: int
    r: int
    lora_alpha: float
    scaling: float
    trains_bias: bool
    kernel: tuple[int, ...] = ()
    groups: int = 1
    lora_bias: bool = False
    is_adalora: bool = False
    has_magnitude: bool = False
    parameter: str = ""
    num_experts: int = 1
    is_transposed: bool = False
    depth: int = 0

    @property
    def name(self) -> str:
        """The path that rank_pattern and alpha_pattern are held against: that of a parameter ends with its own name."""
        return f"{self.path}.{self.parameter}" if self.parameter else self.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Role -> shape of the tensors of the pair, in the order in which they are made."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (self.r * self.num_experts, self.in_features, *self.kernel),
            "lora_B": (self.out_features, self.r * self.num_experts // self.groups, *(1 for _ in self.kernel)),
        }
        if self.is_adalora:
            shapes["lora_E"] = (self.r, 1)
        if self.lora_bias:
            shapes["lora_bias"] = (self.out_features,)
        if self.kind.word == "attention":
            shapes |= {"out.lora_A": (self.r, self.in_features), "out.lora_B": (self.in_features, self.r)}
        return shapes

    @property
    def num_pair_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values()) + self.has_magnitude * self.out_features

    @property
    def num_parameters(self) -> int:
        return self.num_pair_parameters + self.trains_bias * self.out_features


@dataclass(frozen=True)
class PlannedTable:
    """A table of which the rows of some tokens are trained; `tied` are the other modules that hold its weight."""

    path: str
    tokens: tuple[int, ...]
    columns: int
    tied: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        return len(self.tokens) * self.columns


@dataclass(frozen=True)
class AttachPlan:
    """What an adapter would consist of. `saved` and `biases` map paths of replaced modules to their trained parameters."""

    config: LoraConfig
    layers: tuple[PlannedLayer, ...]
    saved: dict[str, int]
    biases: dict[str, int]
    num_base_parameters: int
    warnings: tuple[str, ...] = field(default=())
    tables: tuple[PlannedTable, ...] = field(default=())
    ties: tuple[tuple[tuple[str, str], ...], ...] = field(default=())
    """Groups of (path in `saved`, parameter name) that are trained as one; `saved` counts such a parameter once."""

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        counts = [*self.saved.values(), *self.biases.values(), *(table.num_parameters for table in self.tables)]
        return sum(layer.num_parameters for layer in self.layers) + sum(counts)

    @property
    def share(self) -> float:
        """Trained numbers as a share of the base's."""
        return self.num_parameters / max(1, self.num_base_parameters)

    def __str__(self) -> str:
        names = Counter(
            (
                ".".join(layer.name.split(".")[-2:]) if layer.parameter else layer.path.rsplit(".", 1)[-1],
                layer.in_features,
                layer.out_features,
                f"r={layer.r}" + (f" for each of {layer.num_experts} experts" if layer.num_experts > 1 else ""),
                layer.num_pair_parameters,
            )
            for layer in self.layers
        )
        lines = [f"{self.num_parameters:,} of {self.num_base_parameters:,} parameters are trained ({self.share:.2%})"]
        for (name, in_features, out_features, ranks, each), count in names.items():
            lines.append(f"  {count:4d} x {name:16s} {in_features} -> {out_features}, {ranks}: {each:,} each")
        lines += [f"  saved whole: {path} ({count:,})" for path, count in self.saved.items()]
        lines += [f"  {len(table.tokens)} rows of {table.path} ({table.num_parameters:,})" for table in self.tables]
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
    if config.ensure_weight_tying:
        saved |= _sharing(model, modules, saved)
    faults = _saved_faults(modules, saved)
    ties = _tied_copies(modules, saved) if config.ensure_weight_tying else ()
    for (first, key), *others in ties:
        for path in {path for path, _ in others} - {first}:
            saved[path] -= modules[first].get_parameter(key).numel()
    layers = []
    for path, module in modules.items():
        if not path or not is_target(config, path):
            continue
        kind = layer_kind(module)
        if kind is None:
            only = "only Linear, Embedding, Conv1D, Conv1d/2d/3d and MultiheadAttention layers can be adapted"
            faults.append(f"{path} is a {_class_name(module)}; {only}")
        elif reason := why_not(module, modules[path.rpartition(".")[0]]) or (config.use_dora and why_no_magnitude(module)):
            faults.append(f"{path}: {reason}")
        elif whole := holder(path, saved):
            faults.append(f"{path} lies in {whole}, which modules_to_save replaces; name in modules_to_save only what it should")
        elif isinstance(config, AdaLoraConfig) and not is_linear(module):
            faults.append(f"{path} is a {_class_name(module)}; AdaLoRA adapts Linear and Conv1D layers")
        elif kind.word == "attention" and (config.lora_bias or config.bias != "none"):
            faults.append(f"{path} is a MultiheadAttention, which bias and lora_bias are not made for; leave one of them out")
        elif config.lora_bias and kind.word == "embedding":
            faults.append(f"{path} is an embedding, which lora_bias is not made for; leave one of them out")
        elif (layer := _planned(config, path, module, kind)).r % layer.groups:
            faults.append(
                f"{path} has {layer.groups} groups, which do not divide r={layer.r}; set rank_pattern for it, or leave it out"
            )
        else:
            layers.append(layer)
    faults += _unmatched(config, modules)
    parameters, parameter_faults = find_parameters(config, modules, saved, {layer.path for layer in layers})
    layers += [_planned_parameter(config, found, modules[found.path]) for found in parameters]
    faults += parameter_faults
    faults += _without_start(config, layers)
    biases = {}
    if config.bias == "all":
        paired = {layer.path for layer in layers}
        for path, module in modules.items():
            bias = module._parameters.get("bias")
            if not path or bias is None or path in paired or holder(path, saved):
                continue
            if reason := why_hidden(module, modules[path.rpartition(".")[0]]):
                faults.append(f"bias='all' trains the bias of {path}: {reason}")
            biases[path] = bias.numel()
    if config.ensure_weight_tying and not ties:
        faults.append("ensure_weight_tying has no effect: no module of modules_to_save shares a weight with another")
    tables = _planned_tables(model, modules, config)
    held = {*saved, *biases, *(layer.path for layer in layers)}
    faults += _table_faults(modules, tables, held)
    held |= {path for table in tables for path in (table.path, *table.tied)}
    faults += inside_owner({layer.path for layer in layers if layer.kind is PARAMETER}, held)
    if faults:
        raise TargetError(_listed(f"the configuration does not fit this {_class_name(model)} ({len(faults)} faults)", faults))
    warnings = _warnings(model, modules, given, config, layers, saved)
    return AttachPlan(config, tuple(layers), saved, biases, _count(model), warnings, tuple(tables), ties)


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
    return config.changed(target_modules=shortest_names(linear, admitted))


def is_linear(module: nn.Module) -> bool:
    """Return whether 'all-linear' means this kind of module."""
    kind = layer_kind(module)
    return kind is not None and kind.word in ("linear", "conv1d")


def shortest_names(paths: list[str], modules: dict[str, nn.Module]) -> list[str]:
    """Return the fewest last parts that match exactly `paths`, so that files list `q_proj` and not 210 paths."""
    wanted = set(paths)
    names = sorted({path.rsplit(".", 1)[-1] for path in paths})
    exact = [name for name in names if not name.isdigit() and all(path in wanted for path in modules if matches_name(name, path))]
    covered = {path for path in paths if any(matches_name(name, path) for name in exact)}
    return exact + sorted(wanted - covered)


def _planned(config: LoraConfig, path: str, module: nn.Module, kind: LayerKind) -> PlannedLayer:
    in_features, out_features = kind.sizes(module)
    trains_bias = config.bias != "none" and getattr(module, "bias", None) is not None
    if isinstance(config, AdaLoraConfig):
        r, lora_alpha = sum(config.mask_of(path)), config.lora_alpha
        scaling = adalora_scaling(config.init_r, lora_alpha)
        return PlannedLayer(path, kind, in_features, out_features, r, lora_alpha, scaling, trains_bias, is_adalora=True)
    r = pattern_value(config.rank_pattern, path, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, path, config.lora_alpha)
    scaling = lora_scaling(r, lora_alpha, config.use_rslora)
    kernel, groups = kind.kernel(module), kind.groups(module)
    return PlannedLayer(
        path,
        kind,
        in_features,
        out_features,
        r,
        lora_alpha,
        scaling,
        trains_bias,
        kernel,
        groups,
        config.lora_bias,
        has_magnitude=config.use_dora,
    )


def _planned_parameter(config: LoraConfig, found: FoundParameter, module: nn.Module) -> PlannedLayer:
    """Which axis is called in and which out is PEFT's choice: of a stack it depends on the module's own word."""
    shape = cast(Tensor, module._parameters[found.key]).shape
    is_transposed = len(shape) == 3 and bool(getattr(module, "is_transposed", False))
    in_features, out_features = shape[-2:] if is_transposed else (shape[-1], shape[-2])
    r = pattern_value(config.rank_pattern, found.name, config.r)
    lora_alpha = pattern_value(config.alpha_pattern, found.name, config.lora_alpha)
    return PlannedLayer(
        found.path,
        parameter_kind(module, found.key),
        in_features,
        out_features,
        r,
        lora_alpha,
        lora_scaling(r, lora_alpha, config.use_rslora),
        trains_bias=False,
        parameter=found.key,
        num_experts=shape[0] if len(shape) == 3 else 1,
        is_transposed=is_transposed,
        depth=found.depth,
    )


def _without_start(config: LoraConfig, layers: list[PlannedLayer]) -> Iterator[str]:
    """Say which layers cannot begin as init_lora_weights asks."""
    init = config.init_lora_weights
    for layer in layers:
        if layer.kind.word not in ("linear", "conv1d") and needs_linear(init):
            yield f"{layer.path}: init '{init}' is for linear layers, this is a layer of kind {layer.kind.word}; use init True"
        elif reason := why_no_start(init, layer.r, layer.in_features, layer.out_features):
            yield f"{layer.path}: {reason}"


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
        if whole := holder(path.rpartition(".")[0], saved):
            faults.append(f"modules_to_save: {path} lies in {whole}, which is saved whole already")
        if not any(True for _ in own_parameters(modules[path])):
            faults.append(f"modules_to_save: {path} has no parameters to train")
    return faults


def _planned_tables(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> list[PlannedTable]:
    wanted = config.trainable_token_indices or {}
    if isinstance(wanted, list):
        find_table = getattr(model, "get_input_embeddings", None)
        table = find_table() if find_table else None
        wanted = {next((path for path, module in modules.items() if module is table), "embed_tokens"): wanted}
    tied, tables, covered = _tied_modules(model), [], dict[str, tuple[int, ...]]()
    for name, tokens in wanted.items():
        for path in [path for path in modules if matches_name(name, path)] or [name]:
            if covered.get(path) == tuple(tokens):
                continue  # named beside a table whose weight it shares, with the same tokens: they are trained once
            weight = modules[path]._parameters.get("weight") if path in modules else None
            others = [other for other in tied.get(id(weight), []) if other != path]
            covered |= dict.fromkeys(others, tuple(tokens))
            columns = weight.shape[-1] if weight is not None and weight.ndim else 0
            tables.append(PlannedTable(path, tuple(tokens), columns, tuple(others)))
    return tables


def _table_faults(modules: dict[str, nn.Module], tables: list[PlannedTable], held: set[str]) -> Iterator[str]:
    seen: set[str] = set()
    for table in tables:
        what, tokens = f"trainable_token_indices: {table.path}", table.tokens
        if table.path not in modules:
            yield f"{what} matches nothing.{did_you_mean(table.path, [path for path in modules if path])}"
            continue
        for path in (table.path, *table.tied):
            kind = layer_kind(modules[path])
            if kind is None or kind.word not in ("embedding", "linear"):
                yield f"{what}: {path} is a {_class_name(modules[path])}; only Embedding and Linear layers have rows for tokens"
            elif reason := why_not(modules[path], modules[path.rpartition(".")[0]]):
                yield f"{what}: {path}: {reason}"
            elif path in held or path in seen or holder(path, dict.fromkeys(held, 0)):
                yield f"{what}: {path} is adapted or trained otherwise by this configuration too; choose one"
            seen.add(path)
        rows = cast(Tensor, modules[table.path]._parameters["weight"]).shape[0] if table.columns else 0
        if bad := [token for token in tokens if not 0 <= token < rows]:
            yield f"{what} has {rows} rows; there is no row for tokens {bad[:10]}"
        if len(set(tokens)) < len(tokens) or not tokens:
            yield f"{what}: the list of tokens is empty or names one twice"


def _tied_copies(modules: dict[str, nn.Module], saved: dict[str, int]) -> tuple[tuple[tuple[str, str], ...], ...]:
    """Return the groups of (path in `saved`, parameter name in it) that are one parameter of several of these modules."""
    places: dict[int, list[tuple[str, str]]] = {}
    for path in saved:
        own = {id(parameter) for parameter in own_parameters(modules[path])}
        for key, parameter in modules[path].named_parameters(remove_duplicate=False):
            if id(parameter) in own:
                places.setdefault(id(parameter), []).append((path, key))
    return tuple(tuple(group) for group in places.values() if len({path for path, _ in group}) > 1)


def _sharing(model: nn.Module, modules: dict[str, nn.Module], saved: dict[str, int]) -> dict[str, int]:
    """Return the modules beside `saved` that hold a weight of one of those, as PEFT adds them."""
    shared = [paths for paths in _tied_modules(model).values() if any(holder(path, saved) for path in paths)]
    return {path: _count(modules[path]) for paths in shared for path in paths if not holder(path, saved)}


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
        if touched and len(paths) > 1 and not config.ensure_weight_tying:
            others = [path for path in paths if path not in touched]
            found.append(
                f"{' and '.join(paths)} share one weight; the adapter changes {' and '.join(touched)}"
                + (f" and leaves {' and '.join(others)} as the base has it" if others else ", each by its own update")
                + ". Where they come to differ, a merge gives each its own copy."
            )
    return tuple(found)


def _without_effect(modules: dict[str, nn.Module], config: LoraConfig, layers: list[PlannedLayer]) -> Iterator[str]:
    for field_name in ("rank_pattern", "alpha_pattern"):
        for expression in getattr(config, field_name):
            # AdaLoRA's keys are a layer's path and the name of its tensor.
            named = expression.removesuffix(".lora_E") if isinstance(config, AdaLoraConfig) else expression
            if not any(pattern_value({named: True}, layer.name, False) for layer in layers):
                yield f"{field_name} key {expression!r} matches no adapted layer and has no effect"
    excluded = config.exclude_modules or []
    for entry in [excluded] if isinstance(excluded, str) else excluded:
        if not any(matches_any(excluded if isinstance(excluded, str) else [entry], path) for path in modules):
            yield f"exclude_modules entry {entry!r} matches nothing and has no effect"
    chosen = config.layers_to_transform
    for index in [chosen] if isinstance(chosen, int) else chosen or []:
        if not any(block_index(layer.path, config.layers_pattern) == index for layer in layers if not layer.parameter):
            yield f"layers_to_transform index {index} matches no adapted layer and has no effect"
    if config.target_parameters and (config.exclude_modules or chosen not in (None, [])):
        yield "exclude_modules and layers_to_transform do not choose among target_parameters, here and in PEFT; give longer paths"
    if config.bias == "lora_only" and layers and not any(layer.trains_bias for layer in layers):
        yield "bias='lora_only' has no effect: no adapted layer has a bias"
    for word in ("embedding", "attention"):
        if config.lora_dropout and any(layer.kind.word == word for layer in layers):
            yield f"lora_dropout has no effect on {word} layers"
    if config.init_lora_weights == "eva":
        yield "init 'eva': lora_A is kaiming-uniform until it has seen data (luthier train, luthier.train.eva.start_from_inputs)"


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
