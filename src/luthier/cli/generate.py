"""`luthier generate`: one prompt, or a chat in the terminal, with an adapter, without, or both side by side."""

import sys
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import ADAPTER, DTYPE, FORCE, JSON, MODEL, QUANTIZE, make_console, print_json
from luthier.core.errors import ConfigError

if TYPE_CHECKING:
    from luthier.cli.loading import Loaded


def generate(
    prompt: str | None = typer.Argument(None, help="What to say; '-' reads it from stdin. Without it a chat begins."),
    model: str | None = MODEL,
    adapter: str | None = ADAPTER,
    compare: bool = typer.Option(False, help="Answer with the base and with the adapter, side by side."),
    system: str | None = typer.Option(None, help="System message. Default: the one the adapter was trained with."),
    max_new_tokens: int = typer.Option(256, min=1, help="Longest answer, in tokens."),
    temperature: float = typer.Option(0.0, min=0.0, help="0 takes the likeliest token each time."),
    top_p: float = typer.Option(1.0, min=0.0, max=1.0, help="Sample from the likeliest tokens that make up this share."),
    seed: int | None = typer.Option(None, help="Makes sampled answers repeatable."),
    dtype: str = DTYPE,
    quantize: str | None = QUANTIZE,
    force: bool = FORCE,
    as_json: bool = JSON,
) -> None:
    """Ask a model, with an adapter or without. The answer is streamed as it comes."""
    console = make_console(as_json)
    if compare and adapter is None:
        raise ConfigError("--compare needs --adapter: there is nothing to compare the base with")
    if prompt is None and as_json:
        raise ConfigError("--json needs a prompt; a chat has no single result")
    if prompt == "-":
        prompt = sys.stdin.read()
    from luthier.cli.loading import load

    loaded = load(model, adapter, dtype=dtype, quantize=quantize, console=console, force=force)
    if system is None:
        system = loaded.recipe.get("data", {}).get("system")
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    start = [{"role": "system", "content": system}] if system else []
    if prompt is None:
        chat(console, loaded, start, options, compare)
        return
    messages = [*start, {"role": "user", "content": prompt}]
    if as_json:
        answers = {side: "".join(pieces(loaded, side, messages, options)) for side in sides(loaded, compare)}
        print_json({"prompt": prompt, "model": str(loaded.base.spec), "adapter": adapter, "answers": answers})
    else:
        for side in sides(loaded, compare):
            say(console, loaded, side, messages, options, compare)


def sides(loaded: "Loaded", compare: bool) -> list[str]:
    """Return who answers: "base", "adapter", or both."""
    if loaded.report is None:
        return ["base"]
    return ["base", "adapter"] if compare else ["adapter"]


def pieces(loaded: "Loaded", side: str, messages: list[dict[str, str]], options: dict[str, Any]) -> Any:
    """Yield one side's answer in pieces."""
    from contextlib import nullcontext

    from luthier.adapt.switching import disabled
    from luthier.engine.generation import stream

    tokenizer, model = loaded.base.tokenizer, loaded.base.model
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        ids = tokenizer(messages[-1]["content"])["input_ids"]
    with disabled(model) if side == "base" else nullcontext():
        yield from stream(model, tokenizer, ids, **options)


def say(console: Any, loaded: "Loaded", side: str, messages: list[dict[str, str]], options: dict[str, Any], titled: bool) -> str:
    """Print one side's answer as it comes, and return it."""
    if titled:
        console.rule(side, align="left")
    answer = ""
    for piece in pieces(loaded, side, messages, options):
        answer += piece
        console.print(piece, end="", highlight=False, soft_wrap=True)
    console.print()
    return answer


def chat(console: Any, loaded: "Loaded", start: list[dict[str, str]], options: dict[str, Any], compare: bool) -> None:
    """Talk until the input ends. Under --compare each side answers to its own answers before."""
    console.print("A chat; /new starts over, an empty line or Ctrl-D ends it.", style="dim")
    histories = {side: list(start) for side in sides(loaded, compare)}
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
        for side, history in histories.items():
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": say(console, loaded, side, history, options, compare)})
