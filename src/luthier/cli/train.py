"""`luthier train`: flags and one TOML file to a training run."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.launching import carry_out_in_processes
from luthier.cli.output import JSON, make_console, print_json, quiet_transformers
from luthier.cli.registry_opening import REGISTRY, caller, opened
from luthier.core.errors import ConfigError, LuthierError
from luthier.train.launching import process_of

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.train.settings import RunSettings


def train(
    config: list[Path] = typer.Option(
        [], "--config", "-c", help="TOML file with settings; flags win over it. Several: adapters side by side over one base."
    ),
    model: str | None = typer.Option(None, "--model", "-m", help="Base model: Hub id, folder, GGUF file or wheel."),
    data: str | None = typer.Option(None, "--data", "-d", help="Rows: a JSONL or Parquet file, or a Hub data set."),
    eval_data: str | None = typer.Option(None, help="Held-out rows; without it a share of the rows is held out."),
    out: str | None = typer.Option(None, "--out", "-o", help="Folder of the run. Default: runs/<data>-<number>."),
    continued: str | None = typer.Option(
        None, "--from", metavar="ADAPTER", help="Go on from this adapter, its folder or that of its run, instead of a fresh one."
    ),
    resume: list[Path] = typer.Option(
        [], help="Carry on with the run in this folder, or with several side by side; nothing else may be given."
    ),
    dry_run: bool = typer.Option(False, help="Show what would be trained, with a sample of the labels, and stop."),
    method: list[str] = typer.Option([], help="Method, as in `luthier methods`; repeat it to combine. Default: lora."),
    objective: str | None = typer.Option(None, help="What is minimised: sft (the default), dpo, kto, reward, grpo or ppo."),
    init: str | None = typer.Option(None, help="How pairs begin, as in `luthier methods`. Default: kaiming."),
    r: int | None = typer.Option(None, "--r", help="Rank. Default 16."),
    lora_alpha: float | None = typer.Option(None, help="Numerator of the scaling. Default: twice the rank."),
    target: list[str] = typer.Option([], help="Module to adapt; repeat it. Default: all linear layers."),
    learning_rate: float | None = typer.Option(None, "--learning-rate", "--lr", help="Peak learning rate. Default 2e-4."),
    epochs: int | None = typer.Option(None, help="Passes over the rows. Default 1."),
    max_steps: int | None = typer.Option(None, help="Stop after so many optimiser steps."),
    batch_tokens: int | None = typer.Option(None, help="Tokens in one forward pass. Default 2048."),
    batch_rows: int | None = typer.Option(None, help="Rows in one forward pass at most."),
    patience: int | None = typer.Option(None, help="Stop after so many evaluations without a better held-out loss."),
    nproc: int | None = typer.Option(None, min=1, help="Processes on this machine that carry the run out. Default 1."),
    shard: str | None = typer.Option(None, help="With several processes: fsdp2 spreads the base over them. Default: none."),
    seed: int | None = typer.Option(None, help="Of init, order and dropout. Default 0."),
    dtype: str | None = typer.Option(None, help="Of the base weights: auto, bfloat16, float32 or float16."),
    quantize: str | None = typer.Option(None, help="Of the base: none, or nf4 for linear layers in 4 bits (QLoRA)."),
    prompt: str | None = typer.Option(None, help="Jinja template over a row's columns for the request."),
    completion: str | None = typer.Option(None, help="Jinja template over a row's columns for the answer."),
    system: str | None = typer.Option(None, help="System message for every row that has none."),
    reward: list[str] = typer.Option(
        [],
        help="What answers are judged by (objectives grpo, ppo): file.py:function, json, json:KEY,KEY, regex:PATTERN, "
        "exact:TEMPLATE or length:CHARACTERS; repeat it.",
    ),
    reward_command: list[str] = typer.Option([], help="The same by a command: JSON lines in, a number a line out; repeat it."),
    track: list[str] = typer.Option([], help="Follow the run with mlflow, wandb, tensorboard or trackio too; repeat it."),
    register: str | None = typer.Option(
        None, "--register", metavar="NAME", help="Register the finished adapter as the next version of NAME, with its data."
    ),
    owner: str | None = typer.Option(None, help="With --register: who answers for a new NAME and new data. Default: who calls."),
    registry: str | None = REGISTRY,
    settings: list[str] = typer.Option([], "--set", "-s", help="Any other setting, as in -s train.accumulate=4; repeat it."),
    as_json: bool = JSON,
) -> None:
    """Train a LoRA adapter on a file of examples. Ctrl-C stops at a checkpoint that --resume carries on from."""
    console = make_console(as_json)
    rank, size = process_of(os.environ)
    if size > 1 and nproc not in (None, size):
        raise ConfigError(f"--nproc says {nproc}, but this is process {rank} of {size} that were started already; leave it out")
    if rank == 0:
        _check_registering(register, owner, registry, dry_run=dry_run)
    flags: dict[str, Any] = {
        "model": model,
        "out": out,
        "dtype": dtype,
        "quantize": quantize,
        "adapter": continued,
        "objective": {"kind": objective, "rewards": reward_sources(reward, reward_command)},
        "data": {"path": data, "eval_path": eval_data, "prompt": prompt, "completion": completion, "system": system},
        "lora": {"r": r, "lora_alpha": lora_alpha, "target_modules": target or None, "init_lora_weights": init_value(init)},
        "train": {
            "learning_rate": learning_rate,
            "epochs": epochs,
            "max_steps": max_steps,
            "batch_tokens": batch_tokens,
            "batch_rows": batch_rows,
            "patience": patience,
            "shard": shard,
            "seed": seed,
            "track": track or None,
        },
    }
    for setting in settings:
        put_setting(flags, setting)
    if max(len(config), len(resume)) > 1:
        alone = {"--register": register is not None, "--dry-run": dry_run, "--nproc": nproc not in (None, 1) or size > 1}
        _train_many(config, resume, flags, method, alone, console, as_json)
        return
    if resume:
        given = sorted(named(flags)) + ["--config"] * bool(config) + ["--dry-run"] * dry_run + ["--method"] * bool(method)
        if given:
            raise ConfigError(f"--resume takes its settings from the run; also given: {', '.join(given)}. Leave them out.")
        if size == 1 and nproc not in (None, 1):
            carry_out_in_processes(nproc, str(resume[0]), [])
        quiet_transformers()
        from luthier.train.run import resume as carry_on

        outcome = carry_on(resume[0], console=console)
    else:
        resolved = _resolved(config[0] if config else None, flags, method)
        if nproc is not None and dry_run:
            resolved = resolved.changed(train=resolved.train.changed(processes=resolved.train.processes or nproc, shard="none"))
        elif size == 1 and nproc not in (None, 1):
            carry_out_in_processes(nproc, resolved.out, ["--out", resolved.out] if flags["out"] is None else [])
        quiet_transformers()
        from luthier.train.run import dry_run as look
        from luthier.train.run import train as start

        if dry_run:
            found = look(resolved, console=console)
            if as_json:
                print_json({"settings": resolved.model_dump(mode="json"), "preflight": found.as_dict()})
            return
        outcome = start(resolved, console=console)
    registered = None
    if rank > 0:
        as_json, register = False, None  # the first process tells and registers
    if register is not None and outcome.summary["ended"] != "interrupted":
        registered = _register(outcome.summary["run"], register, owner, registry, console)
    if as_json:
        told = {"registered": registered} if registered else {}
        print_json(outcome.summary | {"preflight": outcome.preflight.as_dict()} | told)
    if outcome.summary["ended"] == "interrupted":
        raise typer.Exit(130)


def _resolved(config: Path | None, flags: dict[str, Any], method: list[str], taken: Collection[str] = ()) -> "RunSettings":
    """Return the settings of one run: those of the methods, of the file, and the flags on top."""
    from luthier.train.settings import check_methods, read_settings, settings_of

    flags = dict(flags)
    for section, chosen in settings_of(method).items():
        flags[section] = chosen | {key: value for key, value in flags[section].items() if value is not None}
    flags["out"] = flags["out"] or default_out(config, flags, taken)
    resolved = read_settings(config, flags)
    if method:
        check_methods(resolved, method)
    return resolved


def _train_many(
    configs: list[Path],
    resumed: list[Path],
    flags: dict[str, Any],
    method: list[str],
    alone: dict[str, bool],
    console: "Console",
    as_json: bool,
) -> None:
    """Train or resume several runs over one base."""
    if given := [name for name, is_given in alone.items() if is_given]:
        raise ConfigError(f"{' and '.join(given)} is for one run, and several are named; leave it out, or call luthier for each")
    if resumed and (given := sorted(named(flags)) + ["--config"] * bool(configs) + ["--method"] * bool(method)):
        raise ConfigError(f"--resume takes its settings from the runs; also given: {', '.join(given)}. Leave them out.")
    if flags["out"] is not None:
        raise ConfigError("--out is one folder, and these are several runs; say `out` in their files, or leave it out")
    settings: list[RunSettings] = []
    for config in configs:
        settings.append(_resolved(config, flags, method, [each.out for each in settings]))
    quiet_transformers()
    from luthier.train.many import resume_many, train_many

    outcomes = resume_many(resumed, console=console) if resumed else train_many(settings, console=console)
    if as_json:
        print_json({"runs": [outcome.summary | {"preflight": outcome.preflight.as_dict()} for outcome in outcomes]})
    if any(outcome.summary["ended"] == "interrupted" for outcome in outcomes):
        raise typer.Exit(130)


def _check_registering(name: str | None, owner: str | None, registry: str | None, *, dry_run: bool) -> None:
    """Find out before the training what would keep its adapter from being registered after it."""
    if name is None:
        if given := ["--owner"] * (owner is not None) + ["--registry"] * (registry is not None):
            raise ConfigError(f"{' and '.join(given)} would have no effect without --register NAME")
        return
    if dry_run:
        raise ConfigError("--register would have no effect with --dry-run; leave one of the two out")
    from luthier.registry.registering import check_name

    check_name(name)
    caller(opened(registry, create=True), None, "register")


def _register(run: str, name: str, owner: str | None, registry: str | None, console: "Console") -> str:
    from luthier.registry.runs import register_run

    try:
        store = opened(registry)
        actor = caller(store, None, "register")
        done = register_run(store, run, name=name, actor=actor, owner=owner, default_owner=actor)
    except LuthierError:
        console.print(f"The run is finished and safe. To register it: luthier registry add {run} --name {name}", soft_wrap=True)
        raise
    console.print(f"Registered as {done.reference}", highlight=False, soft_wrap=True)
    return done.reference


def reward_sources(rewards: list[str], commands: list[str]) -> list[dict[str, Any]] | None:
    """Return objective.rewards as flags say; None where there are none."""
    found: list[dict[str, Any]] = []
    for text in rewards:
        word, colon, rest = text.partition(":")
        if word == "json":
            found.append({"valid_json": [key for key in rest.split(",") if key]})
        elif word in ("regex", "exact", "length") and colon:
            found.append({{"regex": "regex", "exact": "exact_match", "length": "max_length"}[word]: rest})
        else:
            found.append({"function": text})
    return [*found, *({"command": command} for command in commands)] or None


def init_value(name: str | None) -> bool | str | None:
    """Return what lora.init_lora_weights is for the init with this name; the settings refuse a name that is none."""
    return True if name == "kaiming" else name


def put_setting(values: dict[str, Any], setting: str) -> None:
    """Put `section.key=value` into nested values; the value is read as TOML, or taken as text."""
    import tomllib

    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set wants section.key=value, such as train.accumulate=4; given: {setting!r}")
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        found = {}
    # Text of several lines may happen to be TOML with more in it than one value.
    value = found["value"] if list(found) == ["value"] and "\n" not in text else text
    *sections, key = path.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {setting}: {section!r} is a value, not a section")
    before = values.get(key)
    if named(before) if isinstance(before, dict) else before is not None:
        raise ConfigError(f"--set {setting}: {path} is given twice, by two --set or by its own flag. Give it once.")
    values[key] = value


def named(values: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the values that are not None."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += named(value, f"{prefix}{key}.")
        elif value is not None:
            found.append(prefix + key)
    return found


def default_out(config: Path | None, flags: dict[str, Any], taken: Collection[str] = ()) -> str | None:
    """Return runs/<data>-<number>, the first number that is free and not `taken`; None if the file of settings says where to."""
    if config is not None:
        import tomllib

        try:
            values = tomllib.loads(config.read_text())
        except (OSError, ValueError):
            return None  # read_settings says what is wrong with the file
        if "out" in values:
            return None
        section = values.get("data")
        data = flags["data"]["path"] or (section.get("path") if isinstance(section, dict) else None)
    else:
        data = flags["data"]["path"]
    stem = Path(str(data)).stem if data else "run"
    paths = (Path("runs") / f"{stem}-{number}" for number in range(1, 10_000))
    return next(str(path) for path in paths if not path.exists() and str(path) not in taken)
