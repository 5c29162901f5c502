"""`luthier bench-serve`: load on a server of OpenAI's API, and how fast it answered."""

import asyncio
import time
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.chat import KEY, URL, key_of
from luthier.cli.output import JSON, make_console, print_json
from luthier.core.errors import ConfigError, RemoteError

if TYPE_CHECKING:
    from rich.table import Table

    from luthier.serve.load import LoadSettings


def bench_serve(
    url: str = URL,
    key: str | None = KEY,
    model: list[str] = typer.Option([], "--model", "-m", help="Whom to ask; repeat it. Default: all that the key may use."),
    clients: int = typer.Option(8, min=1, help="Clients at a time; each asks again as soon as it is answered."),
    requests: int | None = typer.Option(None, min=1, help="Requests in all. Default: 100, or what --seconds allows."),
    seconds: float | None = typer.Option(None, min=0.1, help="No request begins later than this."),
    prompts: str | None = typer.Option(None, help="File of prompts, as `luthier generate` reads it. Default: made up."),
    prompt_words: int = typer.Option(30, min=1, help="About so many words in a prompt that is made up."),
    max_tokens: int = typer.Option(64, min=1, help="Longest answer, in tokens."),
    zipf: float = typer.Option(0.0, min=0.0, help="Exponent of Zipf's law over the models; 0: all alike."),
    leave: float = typer.Option(0.0, min=0.0, max=1.0, help="Share of requests whose client leaves in the middle of the answer."),
    hang_up: float = typer.Option(0.0, min=0.0, max=1.0, help="Share whose client leaves before the first token."),
    seed: int = typer.Option(0, help="Of what is drawn."),
    as_json: bool = JSON,
) -> None:
    """Ask a server as many clients would, and tell seconds to the first token, for each token and for the whole, and tokens/s."""
    console = make_console(as_json)
    from luthier.cli.answering import prompts_in
    from luthier.serve.load import LoadSettings, made_up_prompts

    if leave + hang_up > 1:
        raise ConfigError(f"--leave {leave} and --hang-up {hang_up} are more than all requests; needed is a sum of at most 1")
    load = LoadSettings(
        clients=clients,
        requests=requests if requests or seconds else 100,
        seconds=seconds,
        max_tokens=max_tokens,
        zipf=zipf,
        leave=leave,
        hang_up=hang_up,
        seed=seed,
    )
    asked = prompts_in(prompts) if prompts is not None else made_up_prompts(64, prompt_words, seed)
    found = asyncio.run(measured(url, key_of(key), model, asked, load))
    if as_json:
        print_json(found)
    else:
        console.print(table(found))
        for line in found["errors"]:
            console.print(line, highlight=False, soft_wrap=True)


async def measured(url: str, key: str, models: list[str], prompts: list[Any], load: "LoadSettings") -> dict[str, Any]:
    """Run a load and return its summary. Raises: RemoteError where nobody answers at all."""
    from luthier.serve.client import Client
    from luthier.serve.load import run_load, summary

    async with Client(url, key, connections=load.clients) as client:
        known = await client.models()
        if unknown := [name for name in models if name not in known]:
            raise RemoteError(f"this key may not use {', '.join(unknown)}; it may use {', '.join(known) or 'nothing'}", 404)
        begin = time.perf_counter()
        done = await run_load(client, models or known, prompts, load)
        seconds = time.perf_counter() - begin
    errors = dict.fromkeys(each.error for each in done if each.error)
    return {"settings": load.model_dump(), **summary(done, seconds), "errors": list(errors)[:5]}


def table(found: dict[str, Any]) -> "Table":
    """Return a summary as a table."""
    from luthier.cli.registry_opening import table_of

    shown = table_of("", "#p50", "#p95", "#p99")
    for name, words in (("first_token_s", "first token, s"), ("token_s", "each token, s"), ("request_s", "request, s")):
        shares = found[name]
        shown.add_row(words, *("-" if shares is None else f"{shares[share]:.3f}" for share in ("p50", "p95", "p99")))
    ended = ", ".join(f"{count} {how}" for how, count in sorted(found["ended"].items()))
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(found["statuses"].items()))
    speed = "-" if found["tokens_per_s"] is None else f"{found['tokens_per_s']:.1f} tokens/s"
    shown.caption = (
        f"{found['requests']} requests in {found['seconds']:.1f} s: {ended}{f' ({statuses})' if statuses else ''}; {speed}"
    )
    return shown
