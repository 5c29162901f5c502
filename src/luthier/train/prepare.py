"""From settings to everything a run needs in memory: model, tokenizer, adapter, encoded rows, the plan of steps."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.adapt.attaching import attach
from luthier.adapt.fusing import Fusion, fuse
from luthier.adapt.loftq import attach_loftq, load_without
from luthier.adapt.planning import AttachPlan, plan
from luthier.adapt.ranks import check_schedule
from luthier.adapt.state import adapter_parameters, roster_of
from luthier.core.config import AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError, ModelError
from luthier.core.methods import LOFTQ, keeps_start
from luthier.data.batches import collate, split_rows
from luthier.data.encode import EncodedSet, encode
from luthier.data.formats import sniff_format
from luthier.data.messages import Example, to_examples
from luthier.data.read import read_rows
from luthier.engine.score import can_take_packed
from luthier.formats.adapters import check_base, fingerprint_of, load_adapter
from luthier.formats.fingerprint import Fingerprint
from luthier.formats.folder import read_adapter
from luthier.models.load import LoadedModel, load_model
from luthier.train.baseline import whole_model
from luthier.train.eva import start_from_inputs
from luthier.train.groups import freeze_lora_A
from luthier.train.schedule import Step, plan_steps
from luthier.train.settings import DataSettings, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"
EVA_BATCHES = 8
"""Micro-batches that init 'eva' looks at: the run's first ones."""


@dataclass
class Rows:
    """The rows of a run: examples as read, encoded for training, and what they were told apart by."""

    train: EncodedSet
    held_out: EncodedSet | None
    held_out_examples: list[Example]
    description: str
    digest: str
    digests: dict[str, str] = field(default_factory=dict)
    """Role (train, eval) -> digest of the rows that were read for it; `digest` is of all of them."""


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
    rows = read_and_encode(settings.data, base.tokenizer, settings.train.seed)
    check_rows_fit(rows, base.model)
    lora = named_base(whole_model(base.model) if settings.train.full else settings.lora, base)
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
            first = [batch for _, batches in plan_steps(rows.train.lengths, settings.train) for batch in batches][:EVA_BATCHES]
            pad_id = pad_id_of(base.tokenizer)
            batches = (collate([rows.train.rows[index] for index in indices], pad_id) for indices in first)
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
    steps = plan_steps(rows.train.lengths, settings.train, packed=packed)
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


def read_and_encode(data: DataSettings, tokenizer: "PreTrainedTokenizerBase", seed: int) -> Rows:
    """Read the rows, hold some out, and encode both. Rows are told apart before encoding: a conversation stays on one side."""
    rows = read_rows(data.path, limit=data.limit)
    templates: dict[str, Any] = {"prompt_template": data.prompt, "completion_template": data.completion, "system": data.system}
    description = "columns through the templates of [data]" if data.prompt else sniff_format(rows.rows).description
    examples = to_examples(rows.rows, **templates)
    digest, digests = rows.digest, {"train": rows.digest}
    if data.eval_path is not None:
        held_out_rows = read_rows(data.eval_path)
        held_out = to_examples(held_out_rows.rows, **templates)
        digest = hashlib.sha256((digest + held_out_rows.digest).encode()).hexdigest()
        digests["eval"] = held_out_rows.digest
    else:
        train_index, held_out_index = split_rows(len(examples), data.eval_fraction, seed)
        held_out = [examples[index] for index in held_out_index]
        examples = [examples[index] for index in train_index]
    train_set = encode(examples, tokenizer, max_length=data.max_length)
    held_out_set = encode(held_out, tokenizer, max_length=data.max_length) if held_out else None
    return Rows(train_set, held_out_set, held_out, description, digest, digests)


def check_rows_fit(rows: Rows, model: "PreTrainedModel") -> None:
    """Raise ConfigError if a row is longer than the model can read, or ModelError if it has tokens the model does not have."""
    encoded = [*rows.train.rows, *(rows.held_out.rows if rows.held_out else [])]
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(row) for row in encoded)
    if room and longest > room:
        raise ConfigError(f"the longest row has {longest} tokens, this model reads {room} at most; set data.max_length to {room}")
    highest, known = max(max(row.input_ids) for row in encoded), model.get_input_embeddings().weight.shape[0]
    if highest >= known:
        raise ModelError(
            f"the tokenizer gives token {highest}, but the model knows {known} tokens: they do not belong together. "
            "Use the model's own tokenizer."
        )


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
