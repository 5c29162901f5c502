"""From what a user names (models, adapters with strengths, prompts) to an engine and what it is asked."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.cli.loading import adapter_folder
from luthier.cli.output import quiet_transformers
from luthier.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from luthier.engine import Engine
    from luthier.formats.folder import AdapterFolder
    from luthier.models.load import LoadedModel

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Answering:
    """An engine with the adapters that were named. `mix` is what "adapter" answers with, empty where none was named."""

    engine: "Engine"
    spec: str
    mix: dict[str, float]
    system: str | None

    def sides(self, compare: bool) -> list[str]:
        """Return who answers: "base", "adapter", or both."""
        if not self.mix:
            return ["base"]
        return ["base", "adapter"] if compare else ["adapter"]

    def adapter_of(self, side: str) -> dict[str, float] | None:
        """Return what the engine takes for a side."""
        return None if side == "base" else self.mix

    def ids(self, messages: Messages) -> list[int]:
        """Return the token ids of a chat that waits for its answer; without a chat template, of what was said last."""
        tokenizer = self.engine.tokenizer
        if tokenizer.chat_template:
            found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        else:
            found = tokenizer(messages[-1]["content"])["input_ids"]
        return list(found)


@contextmanager
def answering(
    model: str | None,
    adapters: Sequence[str],
    *,
    dtype: str,
    quantize: str | None,
    form: str | None,
    force: bool,
    console: Any,
) -> Iterator[Answering]:
    """Load a base into an engine, with adapters given as FOLDER or FOLDER=STRENGTH. All of them are read before it is asked.

    Without `model` it is the base that the adapters name, without `quantize` it is in 4 bits where they were trained so, without
    `form` its weights stay in 4 bits if they are.
    """
    mix = strengths(adapters)
    quiet_transformers()
    from luthier.engine import Engine
    from luthier.formats.fingerprint import Verdict
    from luthier.formats.folder import read_adapter
    from luthier.ops.prepacked import known_form

    if form is not None:
        known_form(form)
    folders = {name: read_adapter(adapter_folder(name)) for name in mix}
    model = _agreed("base", "--model", {name: each.config.base_model_name_or_path for name, each in folders.items()}, model)
    if not model and folders:
        raise ConfigError(f"{' and '.join(folders)} do not name a base; say it with --model")
    if not model:
        raise ConfigError("name a base model with --model, or an adapter with --adapter")
    recipes = {name: folder.note.get("recipe") or {} for name, folder in folders.items()}
    trained = {name: recipe.get("quantize", "none") for name, recipe in recipes.items()}
    load = _loader(model, _agreed("quantize", "--quantize", trained, quantize) or "none", folders)
    base = load(dtype, lambda message: console.print(message, style="dim"))
    kept = str(base.dtype_choice.dtype).removeprefix("torch.")
    engine = Engine(
        base.model,
        base.tokenizer,
        form=form or ("float" if base.packing is None else "nf4"),
        reload=lambda: load(kept, None).model,
    )
    spec = str(base.spec)
    del base  # the engine has copies of the weights, and the memory is wanted back
    with engine:
        for name in folders:
            engine.add_adapter(name, adapter_folder(name), force=force)
            base_is = engine.check_adapter(name).base
            if base_is.verdict is Verdict.QUANTISED_OF:
                console.print(f"The base is not bit for bit the adapter's: {base_is.reason}.", style="dim")
        systems = {each.get("data", {}).get("system") for each in recipes.values()}
        if len(systems) > 1:
            console.print("The adapters have different system messages, so there is none; say one with --system.", style="dim")
        yield Answering(engine, spec, mix, systems.pop() if len(systems) == 1 else None)


def strengths(adapters: Sequence[str]) -> dict[str, float]:
    """Read FOLDER and FOLDER=STRENGTH. Raises: ConfigError for a strength that is no number, and a folder named twice."""
    mix: dict[str, float] = {}
    for given in adapters:
        name, equals, number = given.rpartition("=")
        if not equals or Path(given).exists():
            name, number = given, "1"
        try:
            strength = float(number)
        except ValueError:
            raise ConfigError(f"--adapter {given}: {number!r} is no number; write FOLDER=STRENGTH, as in runs/a=0.5") from None
        if not math.isfinite(strength):
            raise ConfigError(f"--adapter {given}: the strength is {strength}; needed is a finite number")
        if name in mix:
            raise ConfigError(f"--adapter {name} is named twice; name it once, with the sum of the strengths")
        mix[name] = strength
    return mix


def prompts_in(path: str) -> list[Messages]:
    """Return the prompts in a file: of a file of rows (JSONL, JSON, Parquet) what `prompt` or `messages` hold, else each line.

    Raises: DataError.
    """
    file = Path(path)
    if file.suffix in {".jsonl", ".ndjson", ".json", ".parquet"}:
        from luthier.data.read import read_rows

        rows = read_rows(file).rows
        strange = [place for place, row in enumerate(rows) if not _is_prompt(row)]
        if strange:
            raise DataError(
                f"{len(strange)} of {len(rows)} rows in {path} hold no prompt, the first of them row {strange[0]}: needed is a "
                "text in `prompt`, or in `messages` a list of {role, content} that ends with the user's"
            )
        return [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in rows]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a file of prompts: {error}") from error
    found = [[{"role": "user", "content": line}] for line in lines if line.strip()]
    if not found:
        raise DataError(f"{path} holds no prompt; needed is one on each line")
    return found


def _is_prompt(row: dict[str, Any]) -> bool:
    messages = row.get("messages")
    if messages is None:
        return isinstance(row.get("prompt"), str)
    whole = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in messages
    )
    return bool(whole and messages and messages[-1]["role"] == "user")


def _agreed(what: str, flag: str, values: Mapping[str, str | None], given: str | None = None) -> str | None:
    """Return what all adapters say, None if they say nothing. Raises: ConfigError if they differ and nothing was given."""
    said = {value for value in values.values() if value}
    if given or len(said) <= 1:
        return given or next(iter(said), None)
    listed = "\n".join(f"  {name}: {value}" for name, value in values.items())
    raise ConfigError(f"the adapters do not agree on their {what}; say it with {flag}:\n{listed}")


def _loader(model: str, quantize: str, folders: "Mapping[str, AdapterFolder]") -> "Callable[[str, Any], LoadedModel]":
    """Return what loads the base, the same each time; with the weights that a LoftQ adapter was fitted to, if there is one."""
    from luthier.adapt.loftq import load_without
    from luthier.models.load import load_model

    minus = next((folder.minus for folder in folders.values() if folder.minus), None) if quantize != "none" else None

    def load(dtype: str, progress: Any) -> "LoadedModel":
        if minus:
            return load_without(model, minus, dtype=dtype, progress=progress)
        return load_model(model, quantize=quantize, dtype=dtype, progress=progress)

    return load
