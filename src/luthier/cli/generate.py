"""`luthier generate`: one prompt, many, or a chat in the terminal; with adapters, without, or both side by side."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.cli.answering import Answering, Messages
    from luthier.engine import Completion, Sampling
    from luthier.engine.requests import Constraint


def generate(
    prompt: str | None = typer.Argument(None, help="What to say; '-' reads it from stdin. Without any prompt a chat begins."),
    more: list[str] = typer.Option([], "--prompt", "-p", help="One more prompt; repeat it. All are answered at once."),
    prompts: str | None = typer.Option(
        None, help="File of prompts: one on each line, or rows (.jsonl, .json, .parquet) with `prompt` or `messages`."
    ),
    model: str | None = MODEL,
    adapter: list[str] = typer.Option(
        [], "--adapter", "-a", help="Adapter folder, or the folder of a run; several are added up, each FOLDER=STRENGTH."
    ),
    compare: bool = typer.Option(False, help="Answer with the base and with the adapter, side by side."),
    system: str | None = typer.Option(None, help="System message. Default: the one the adapter was trained with."),
    max_new_tokens: int = typer.Option(256, min=1, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this share."),
    top_k: int = typer.Option(0, min=0, help="Sample from so many of the likeliest tokens; 0: all."),
    min_p: float = typer.Option(0.0, min=0.0, max=1.0, help="Only tokens at least so likely as this share of the likeliest one."),
    repetition_penalty: float = typer.Option(1.0, help="Logits of tokens in prompt or answer are divided by it."),
    presence_penalty: float = typer.Option(0.0, min=-2.0, max=2.0, help="Taken off the logit of a token that the answer has."),
    frequency_penalty: float = typer.Option(0.0, min=-2.0, max=2.0, help="Taken off for each time that the answer has it."),
    seed: int | None = typer.Option(None, help="Makes sampled answers repeatable."),
    stop: list[str] = typer.Option([], help="Text that ends an answer, which comes without it; repeat it."),
    json_schema: Path | None = typer.Option(None, help="File with a JSON schema: each answer is a document that it accepts."),
    regex: str | None = typer.Option(None, help="Each answer is a text that this regular expression matches whole."),
    choice: list[str] = typer.Option([], help="Each answer is one of these texts; repeat it."),
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    form: str | None = typer.Option(
        None, help="Of the weights in memory: float, int8, int4 or nf4. Default: nf4 for a base in 4 bits, else float."
    ),
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Ask a model, with adapters or without. One answer is streamed as it comes; several prompts are answered at once."""
    console = make_console(as_json)
    if compare and not adapter:
        raise ConfigError("--compare needs --adapter: there is nothing to compare the base with")
    given = [] if prompt is None else [sys.stdin.read() if prompt == "-" else prompt]
    given += more
    if not given and prompts is None and as_json:
        raise ConfigError("--json needs a prompt; a chat has no single result")
    from luthier.cli.answering import answering, prompts_in
    from luthier.engine.requests import Sampling

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop),
        constraint=_constraint(json_schema, regex, choice),
    )
    asked: list[Messages] = [[{"role": "user", "content": each}] for each in given]
    asked += prompts_in(prompts) if prompts is not None else []
    where = {"dtype": dtype, "quantize": quantize, "form": form, "force": force, "console": console}
    with answering(model, adapter, **where) as ready:
        system = ready.system if system is None else system
        start: Messages = [{"role": "system", "content": system}] if system else []
        if not asked:
            chat(console, ready, start, sampling, compare)
            return
        asked = [messages if messages[0]["role"] == "system" else [*start, *messages] for messages in asked]
        named = {"model": ready.spec, "adapter": adapter[0] if len(adapter) == 1 else adapter or None}
        if len(asked) == 1 and prompts is None:
            [messages] = asked
            if as_json:
                [row] = answers(console, ready, asked, sampling, compare, has_bar=False)
                print_json({"prompt": given[0], **named, **row})
            else:
                say(console, ready, messages, sampling, compare)
            return
        rows = answers(console, ready, asked, sampling, compare, has_bar=prompts is not None)
        said = [{"prompt": messages[-1]["content"], **row} for messages, row in zip(asked, rows, strict=True)]
        if as_json:
            print_json({**named, "results": said})
        else:
            show(console, said, titled=compare)


def answers(
    console: Any, ready: "Answering", asked: "list[Messages]", sampling: "Sampling", compare: bool, *, has_bar: bool
) -> list[dict[str, dict[str, str]]]:
    """Answer all at once; return for each what every side said and why it ended."""
    from contextlib import nullcontext
    from functools import partial

    from luthier.cli.progress import progress_bar

    sides = ready.sides(compare)
    pairs = [(ready.ids(messages), ready.adapter_of(side)) for messages in asked for side in sides]
    with progress_bar(console) if has_bar else nullcontext() as on_progress:
        told = partial(on_progress, "answers") if on_progress else None
        found = iter(ready.engine.generate([ids for ids, _ in pairs], [mix for _, mix in pairs], sampling, on_progress=told))
    return [_row({side: next(found) for side in sides}) for _ in asked]


def _row(by_side: "dict[str, Completion]") -> dict[str, dict[str, str]]:
    return {
        "answers": {side: completion.text for side, completion in by_side.items()},
        "finish_reasons": {side: completion.finish_reason for side, completion in by_side.items()},
    }


def show(console: Any, said: list[dict[str, Any]], *, titled: bool) -> None:
    """Print many prompts, each with its answers."""
    for row in said:
        console.rule(row["prompt"].splitlines()[0] if row["prompt"].strip() else "", align="left")
        for side, answer in row["answers"].items():
            if titled:
                console.print(f"{side}:", style="dim")
            console.print(answer, highlight=False, soft_wrap=True)


def say(console: Any, ready: "Answering", messages: "Messages", sampling: "Sampling", compare: bool) -> dict[str, str]:
    """Print each side's answer as it comes, and return what they said. Both run at once."""
    return _told(console, ready, dict.fromkeys(ready.sides(compare), messages), sampling, compare)


def _told(console: Any, ready: "Answering", asked: "dict[str, Messages]", sampling: "Sampling", titled: bool) -> dict[str, str]:
    ids = {side: ready.ids(messages) for side, messages in asked.items()}
    handles = {side: ready.engine.submit(ids[side], adapter=ready.adapter_of(side), sampling=sampling) for side in asked}
    said = {}
    for side, handle in handles.items():
        if titled:
            console.rule(side, align="left")
        for event in handle:
            console.print(event.text, end="", highlight=False, soft_wrap=True)
        console.print()
        said[side] = handle.result().text
    return said


def chat(console: Any, ready: "Answering", start: "Messages", sampling: "Sampling", compare: bool) -> None:
    """Talk until the input ends. Under --compare each side answers to its own answers before."""
    console.print("A chat; /new starts over, an empty line or Ctrl-D ends it.", style="dim")
    histories = {side: list(start) for side in ready.sides(compare)}
    while True:
        try:
            line = console.input("> ").strip()
        except EOFError:
            return
        if not line:
            return
        if line == "/new":
            histories = {side: list(start) for side in histories}
            continue
        for history in histories.values():
            history.append({"role": "user", "content": line})
        for side, answer in _told(console, ready, histories, sampling, compare).items():
            histories[side].append({"role": "assistant", "content": answer})


def _constraint(json_schema: Path | None, regex: str | None, choice: list[str]) -> "Constraint | None":
    """Return the form that answers must have. Raises: ConfigError for more than one, or a schema that cannot be read."""
    from luthier.engine.requests import Constraint

    given = {"--json-schema": json_schema is not None, "--regex": regex is not None, "--choice": bool(choice)}
    if sum(given.values()) > 1:
        named = " and ".join(flag for flag, is_given in given.items() if is_given)
        raise ConfigError(f"{named} are two forms of one answer; give one of them")
    if json_schema is not None:
        try:
            schema = json.loads(json_schema.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--json-schema {json_schema} cannot be read as JSON: {error}") from error
        if not isinstance(schema, dict):
            raise ConfigError(f"--json-schema {json_schema} holds a {type(schema).__name__}; needed is an object, as {{...}}")
        return Constraint(json_schema=schema)
    if regex is not None:
        return Constraint(regex=regex)
    return Constraint(choice=tuple(choice)) if choice else None
