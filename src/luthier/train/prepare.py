"""From settings to everything a run needs in memory: model, tokenizer, adapter, encoded rows, the plan of steps."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import Fusion, fuse
from luthier.adapt.loftq import attach_loftq, load_without
from luthier.adapt.planning import AttachPlan, plan
from luthier.adapt.ranks import check_schedule
from luthier.adapt.state import adapter_parameters, roster_of
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError
from luthier.core.methods import LOFTQ, keeps_start
from luthier.data.batches import collate
from luthier.engine.score import can_take_packed
from luthier.formats.adapters import check_base, fingerprint_of, load_adapter
from luthier.formats.fingerprint import Fingerprint
from luthier.formats.folder import read_adapter
from luthier.models.load import LoadedModel, load_model
from luthier.train.baseline import whole_model
from luthier.train.eva import start_from_inputs
from luthier.train.groups import freeze_lora_A
from luthier.train.objectives import objective_class
from luthier.train.rows import Rows, check_rows_fit
from luthier.train.schedule import Step
from luthier.train.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER = "default"
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
    """The name of the frozen copy of an adapter that the run continues: the reference then, in place of the base."""

    @property
    def pad_id(self) -> int:
        return pad_id_of(self.base.tokenizer)


def prepare(settings: RunSettings, *, tell: Callable[[str], None] | None = None, adapter: Path | None = None) -> Prepared:
    """Load, encode and attach what `settings` name; `adapter` is a saved one to go on from instead of a fresh one.

    Raises: ConfigError, ModelError, DataError, TargetError, each before anything is trained or written.
    """
    tell = tell or (lambda message: None)
    tell(f"Reading {settings.data.path}")
    base = _load_base(settings, tell, adapter)
    objective = objective_class(settings.objective.kind)
    rows = objective.read(settings, base.tokenizer)
    check_rows_fit(rows, base.model)
    lora = named_base(whole_model(base.model) if settings.train.full else settings.lora, base)
    lora = objective.made_ready(base.model, lora, settings.train.seed)
    if adapter is not None and keeps_start(lora.init_lora_weights):
        # Its folder holds a plain adapter; the factors it is trained by, and began with, come from the checkpoint (`restore`).
        check_base(base.model, read_adapter(adapter))
        adapter = None
    if adapter is None:
        torch.manual_seed(settings.train.seed)
        if lora.init_lora_weights == LOFTQ:
            planned, packing = attach_loftq(base.model, lora, ADAPTER)
            tell(str(packing))
        else:
            planned = attach(base.model, lora, ADAPTER)
        if lora.init_lora_weights == "eva":
            tell("Looking at what the layers are given")
            steps = objective.planned(rows.item_lengths, settings, packed=False)
            first = [batch for _, batches in steps for batch in batches][:EVA_BATCHES]
            pad_id = pad_id_of(base.tokenizer)
            batches = (collate([row for index in indices for row in rows.item(index)], pad_id) for indices in first)
            planned = start_from_inputs(base.model, ADAPTER, batches)
    else:
        load_adapter(base.model, adapter, ADAPTER, trainable=True)
        moved = lora.eva_config is not None  # ranks and targets are those that were found when the run began
        planned = plan(base.model, roster_of(base.model).configs[ADAPTER] if moved else lora)
    if settings.train.freeze_A:
        frozen = freeze_lora_A(adapter_parameters(base.model, ADAPTER))
        planned = replace(
            planned, warnings=(*planned.warnings, f"train.freeze_A: lora_A ({frozen:,} of these) stays as it began")
        )
    fingerprint = fingerprint_of(base.model)
    fusion = fuse(base.model) if settings.train.kernels == "fused" else Fusion(reason="train.kernels is plain")
    packed = settings.train.packing and can_take_packed(base.model, rows.train.rows)
    steps = objective.planned(rows.item_lengths, settings, packed=packed)
    if isinstance(planned.config, AdaLoraConfig):
        planned = replace(planned, config=with_total_step(planned.config, len(steps)))
        roster_of(base.model).configs[ADAPTER] = planned.config
    return Prepared(settings, base, rows, planned, steps, fingerprint, fusion, packed)


def _load_base(settings: RunSettings, tell: Callable[[str], None], adapter: Path | None) -> LoadedModel:
    if settings.lora.init_lora_weights != LOFTQ:
        return load_model(settings.model, dtype=settings.dtype, quantize=settings.quantize, progress=tell)
    if adapter is None:
        return load_model(settings.model, dtype=settings.dtype, progress=tell)  # attach_loftq puts it into 4 bits
    return load_without(settings.model, read_adapter(adapter).minus, dtype=settings.dtype, progress=tell)


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
