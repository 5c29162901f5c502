"""From settings to everything a run needs in memory: model, tokenizer, adapter, encoded rows, the plan of steps."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import Fusion, fuse, unfuse
from luthier.adapt.loftq import attach_loftq, load_without
from luthier.adapt.planning import AttachPlan, plan
from luthier.adapt.ranks import check_schedule
from luthier.adapt.state import adapter_parameters, roster_of
from luthier.adapt.switching import activate
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError
from luthier.core.methods import LOFTQ, keeps_start
from luthier.data.batches import collate
from luthier.engine.score import can_take_packed
from luthier.formats.adapters import check_base, fingerprint_of, load_adapter
from luthier.formats.fingerprint import Fingerprint
from luthier.formats.folder import AdapterFolder, read_adapter
from luthier.models.load import LoadedModel, load_model
from luthier.train.baseline import whole_model
from luthier.train.eva import start_from_inputs
from luthier.train.groups import freeze_lora_A
from luthier.train.objectives import objective_class
from luthier.train.parent import FREE, adapter_folder, stored_form
from luthier.train.rows import Rows, check_rows_fit
from luthier.train.schedule import Step
from luthier.train.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "default"
FROZEN = "{name}-start"
"""The frozen copy of an adapter that is continued, where the objective measures against it."""
EVA_BATCHES = 8
"""Micro-batches that init 'eva' looks at: the run's first ones."""


@dataclass
class Prepared:
    """A run that could start now."""

    settings: RunSettings
    base: LoadedModel
    rows: Rows
    plan: AttachPlan
    steps: list[tuple[int, Step]]
    fingerprint: Fingerprint
    fusion: Fusion = field(default_factory=Fusion)
    packed: bool = False
    """Whether rows are laid end to end; else they are padded."""
    adapter: str = ADAPTER
    """The name of the adapter in the model."""
    frozen: str | None = None
    """The name of the frozen copy that the objective measures against, where the run continues an adapter."""
    parent: dict[str, str] = field(default_factory=dict)
    """File -> sha256 of the adapter that the run continues."""

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.base.tokenizer)


def prepare(
    settings: RunSettings,
    *,
    tell: Callable[[str], None] | None = None,
    adapter: Path | None = None,
    base: LoadedModel | None = None,
    name: str = ADAPTER,
    rows: Rows | None = None,
) -> Prepared:
    """Load, encode and attach what `settings` name; `adapter` is one of the run's own checkpoints to go on from.

    `base` is a model that is loaded already and may carry adapters of other runs; this run's is called `name` there.
    `rows` are those that the settings name, where they are in memory already.
    Raises: ConfigError, ModelError, DataError, TargetError, each before anything is trained or written, and what `load_adapter`
    raises where `settings.adapter` does not belong to this base.
    """
    tell = tell or (lambda message: None)
    parent = read_adapter(adapter_folder(settings.adapter)) if settings.adapter is not None else None
    if rows is None:
        tell(f"Reading {settings.data.path}")
    if base is None:
        base = _load_base(settings, tell, read_adapter(adapter) if adapter else parent)
    unfuse(base.model)  # a fused block passes by the hooks that look at a layer's inputs
    objective = objective_class(settings.objective.kind)
    rows = rows or objective.read(settings, base.tokenizer)
    check_rows_fit(rows, base.model)
    lora = named_base(whole_model(base.model) if settings.train.full else settings.lora, base)
    lora = objective.made_ready(base.model, lora, settings.train.seed)
    if adapter is not None and keeps_start(lora.init_lora_weights):
        # Its folder holds a plain adapter; the factors it is trained by, and began with, come from the checkpoint (`restore`).
        check_base(base.model, read_adapter(adapter))
        adapter = None
    torch.manual_seed(settings.train.seed)
    source = read_adapter(adapter) if adapter is not None else parent
    if source is not None:
        planned = _stored(base.model, objective.continued(source, base.model), lora, name, continues=parent is not None)
    else:
        planned = _fresh(settings, base, rows, lora, name, tell)
    activate(base.model, name)
    frozen = None
    if parent is not None and objective.needs_reference:
        frozen = FROZEN.format(name=name)
        load_adapter(base.model, parent, frozen)
    if settings.train.freeze_A:
        count = freeze_lora_A(adapter_parameters(base.model, name))
        planned = replace(planned, warnings=(*planned.warnings, f"train.freeze_A: lora_A ({count:,} of these) stays as it began"))
    if settings.adapter is not None and (note := stored_form(settings.adapter)):
        planned = replace(planned, warnings=(*planned.warnings, note))
    fingerprint = fingerprint_of(base.model)
    fusion = fuse(base.model) if settings.train.kernels == "fused" else Fusion(reason="train.kernels is plain")
    packed = settings.train.packing and can_take_packed(base.model, rows.train.rows)
    steps = objective.planned(rows.item_lengths, settings, packed=packed)
    if isinstance(planned.config, AdaLoraConfig):
        planned = replace(planned, config=with_total_step(planned.config, len(steps)))
        roster_of(base.model).configs[name] = planned.config
    digests = parent.digests if parent else {}
    return Prepared(settings, base, rows, planned, steps, fingerprint, fusion, packed, name, frozen, digests)


def _fresh(
    settings: RunSettings, base: LoadedModel, rows: Rows, lora: LoraConfig, name: str, tell: Callable[[str], None]
) -> AttachPlan:
    """Attach a fresh adapter as the settings have it begin."""
    if lora.init_lora_weights == LOFTQ:
        planned, packing = attach_loftq(base.model, lora, name)
        tell(str(packing))
        return planned
    planned = attach(base.model, lora, name)
    if lora.init_lora_weights != "eva":
        return planned
    tell("Looking at what the layers are given")
    steps = objective_class(settings.objective.kind).planned(rows.item_lengths, settings, packed=False)
    first = [batch for _, batches in steps for batch in batches][:EVA_BATCHES]
    pad_id = pad_id_of(base.tokenizer)
    batches = (collate([row for index in indices for row in rows.item(index)], pad_id) for indices in first)
    activate(base.model, name)
    return start_from_inputs(base.model, name, batches)


def _stored(model: nn.Module, folder: AdapterFolder, lora: LoraConfig, name: str, *, continues: bool) -> AttachPlan:
    """Attach a stored adapter to be trained: one of the run's own, or one that it `continues`; `lora` is that of its settings."""
    if continues:
        if heads := sorted(set(lora.modules_to_save or ()) - set(folder.config.modules_to_save or ())):
            raise ConfigError(
                f"this objective trains {', '.join(heads)} too, which the adapter {folder.path} does not have; begin with a "
                "fresh adapter"
            )
        free = {key: getattr(lora, key) for key in FREE}
        return load_adapter(model, replace(folder, config=folder.config.changed(**free)), name, trainable=True).plan
    load_adapter(model, folder, name, trainable=True)
    moved = lora.eva_config is not None  # ranks and targets are those that were found when the run began
    return plan(model, roster_of(model).configs[name] if moved else lora)


def _load_base(settings: RunSettings, tell: Callable[[str], None], source: AdapterFolder | None) -> LoadedModel:
    """Load the base that the adapter in `source` belongs to, or a fresh one."""
    minus = source.minus if source else {}
    is_loftq = settings.lora.init_lora_weights == LOFTQ
    if minus and settings.quantize != "nf4":
        raise ConfigError(
            f"{settings.adapter} was trained on a base whose 4-bit weights were made with it (LoftQ); set quantize to 'nf4'"
        )
    if minus or (is_loftq and source is not None):
        return load_without(settings.model, minus, dtype=settings.dtype, progress=tell)
    if is_loftq:
        return load_model(settings.model, dtype=settings.dtype, progress=tell)  # attach_loftq puts it into 4 bits
    return load_model(settings.model, dtype=settings.dtype, quantize=settings.quantize, progress=tell)


def named_base(lora: LoraConfig, base: LoadedModel) -> LoraConfig:
    """Record which base the adapter is for: the name it was asked for by, since the folder is this machine's own."""
    if lora.base_model_name_or_path:
        return lora
    return lora.changed(base_model_name_or_path=str(base.spec))


def with_total_step(config: AdaLoraConfig, num_steps: int) -> AdaLoraConfig:
    """Let AdaLoRA's schedule end with the run. Raises: ConfigError for another end, or a run too short for the schedule."""
    if config.total_step not in (None, num_steps):
        raise ConfigError(f"lora.total_step is {config.total_step}, but this run has {num_steps} optimiser steps; leave it out")
    check_schedule(config.model_copy(update={"total_step": num_steps}))
    return config.changed(total_step=num_steps)


def pad_id_of(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token id to pad with; which one does not matter, since padding is masked by position."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
