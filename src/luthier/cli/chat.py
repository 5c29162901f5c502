"""`luthier chat`: a conversation with a server in the terminal, or one answer to what comes on stdin."""

import asyncio
import os
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import typer

from luthier.cli.output import make_console
from luthier.core.errors import ConfigError, RemoteError

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.serve.client import Client

URL = typer.Option("http://127.0.0.1:8000/v1", help="The server, as OpenAI's clients write it.")
KEY = typer.Option(
    None, help="The key. Default: LUTHIER_API_KEY, which other users of the machine do not see.", show_default=False
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
HELP = """/model NAME   ask another model; without a name, list them
/system TEXT  say beforehand what the model is to be; without a text, take it back
/reset        begin anew
/quit         end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(
    url: str = URL,
    key: str | None = KEY,
    model: str | None = typer.Option(None, "--model", "-m", help="An adapter, a surface or the base. Default: the first listed."),
    system: str | None = typer.Option(None, help="System message."),
    max_tokens: int | None = typer.Option(None, min=1, help="Longest answer, in tokens. Default: the server's."),
    temperature: float = typer.Option(0.0, min=0.0, max=2.0, help="0 takes the likeliest token each time."),
) -> None:
    """Talk to a model on a server of OpenAI's API. What is piped in is one prompt, and its answer alone is printed."""
    console = make_console()
    settings: dict[str, Any] = {"temperature": temperature} | ({} if max_tokens is None else {"max_tokens": max_tokens})
    with asyncio.Runner() as runner:
        talk = runner.run(Talk.begin(console, url, key_of(key), model, system, settings))
        try:
            if sys.stdin.isatty():
                converse(talk, runner)
            else:
                runner.run(talk.say(sys.stdin.read()))
        finally:
            runner.run(talk.end())


def key_of(given: str | None) -> str:
    """Return the key to ask with. Raises: ConfigError where there is none."""
    from luthier.serve.client import KEY_VARIABLE

    key = given or os.environ.get(KEY_VARIABLE)
    if not key:
        raise ConfigError(f"a key is needed: put it in {KEY_VARIABLE}. `luthier serve` shows the one it draws")
    return key


def harmless(text: str) -> str:
    """Return a text without what a terminal would obey: a model may say anything, an escape sequence too."""
    return CONTROL.sub("\ufffd", text)


class Talk:
    """One conversation: its model and what was said."""

    def __init__(self, console: "Console", client: "Client", model: str, system: str | None, settings: dict[str, Any]):
        self.console, self.client, self.model, self.system, self.settings = console, client, model, system, settings
        self.turns: list[dict[str, str]] = []

    @classmethod
    async def begin(
        cls, console: "Console", url: str, key: str, model: str | None, system: str | None, settings: dict[str, Any]
    ) -> "Talk":
        """Connect, and take the first model that the key may use where none was named. Raises: RemoteError."""
        from luthier.serve.client import Client

        client = Client(url, key)
        names = [model] if model else await client.models()
        if not names:
            raise RemoteError("this key may use no model; ask whoever gave it to you")
        return cls(console, client, names[0], system, settings)

    async def say(self, prompt: str) -> None:
        """Print the answer as it comes. What was said before is kept only if an answer came to its end."""
        start = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.turns, {"role": "user", "content": prompt}]
        said = []
        try:
            async for chunk in self.client.chat([*start, *asked], self.model, **self.settings):
                sys.stdout.write(harmless(chunk.text) if sys.stdout.isatty() else chunk.text)
                sys.stdout.flush()
                said.append(chunk.text)
        finally:
            sys.stdout.write("\n")
        self.turns = [*asked, {"role": "assistant", "content": "".join(said)}]

    async def command(self, line: str) -> bool:
        """Do what a line that begins with '/' says; return whether the conversation goes on."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word in ("/quit", "/exit"):
            return False
        if word == "/model" and rest:
            self.model = rest
        elif word == "/model":
            for name in await self.client.models():
                self.console.out(f"{'*' if name == self.model else ' '} {name}", highlight=False)
        elif word == "/system":
            self.system = rest or None
        elif word == "/reset":
            self.turns = []
        else:
            self.console.out(HELP, highlight=False)
        return True

    async def end(self) -> None:
        """Close the connection."""
        await self.client.__aexit__(None, None, None)


def converse(talk: Talk, runner: asyncio.Runner) -> None:
    """Take turns until the input ends or /quit."""
    with suppress(ImportError):
        import readline  # noqa: F401  arrow keys and earlier lines in input()
    talk.console.out(f"{talk.model} at {talk.client.url}; /help tells what else can be typed", highlight=False)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        try:
            if line.startswith("/"):
                if not runner.run(talk.command(line)):
                    return
            elif line:
                runner.run(talk.say(line))
        except KeyboardInterrupt:
            continue
        except RemoteError as error:
            talk.console.out(str(error), highlight=False)
