"""`luthier chat` and `luthier bench-serve` against a real server."""

import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.serve_command import Server, luthier_serve
from tests.served_adapters import save_random_adapter
from tests.tiny_run import ENVIRONMENT, command, save_tiny_model
from transformers import AutoModelForCausalLM

PROMPT = "refret my jazz bass"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("chat")
    save_tiny_model(folder / "base", tiny_llama, tiny_tokenizer, max_position_embeddings=2048)
    save_random_adapter(folder / "one", AutoModelForCausalLM.from_pretrained(folder / "base"))
    with luthier_serve("base", "-a", "one", "--dtype", "float32", "--threads", 1, folder=folder) as running:
        yield running


def answer(server: Server, model: str, *turns: tuple[str, str], tokens: int = 12) -> str:
    """The same over HTTP, without the command."""
    messages = [{"role": role, "content": text} for role, text in turns]
    body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}
    found = httpx.post(f"{server.url}/chat/completions", headers=server.headers, json=body, timeout=60)
    return str(found.json()["choices"][0]["message"]["content"])


def environment_for(server: Server) -> dict[str, str]:
    return os.environ | ENVIRONMENT | {"LUTHIER_API_KEY": server.told["key"], "TERM": "dumb"}


def run(server: Server, *words: object, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*words), input=stdin, env=environment_for(server), capture_output=True, text=True, timeout=120, check=False
    )


def test_what_is_piped_in_is_one_prompt(server: Server) -> None:
    said = run(server, "chat", "--url", server.url, "-m", "one", "--max-tokens", 12, stdin=PROMPT)
    assert said.returncode == 0, said.stderr
    assert said.stdout == answer(server, "one", ("user", PROMPT)) + "\n"


def test_the_first_listed_model_answers_where_none_is_named(server: Server) -> None:
    said = run(server, "chat", "--url", server.url, "--max-tokens", 12, "--system", "Say.", stdin=PROMPT)
    assert said.stdout == answer(server, "base", ("system", "Say."), ("user", PROMPT)) + "\n"


def test_a_conversation_in_a_terminal(server: Server) -> None:
    first = answer(server, "base", ("user", "plane"))
    second = answer(server, "one", ("user", "plane"), ("assistant", first), ("user", "glue"))
    afresh = answer(server, "one", ("system", "Say."), ("user", "glue"))
    controller, terminal = pty.openpty()
    words = command("chat", "--url", server.url, "--max-tokens", 12)
    process = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment_for(server), start_new_session=True
    )
    os.close(terminal)
    seen = b""
    try:
        for line in ("plane", "/model", "/model one", "glue", "/reset", "/system Say.", "glue", "/nonsense", "/quit"):
            seen += read_until(controller, b"> ")
            os.write(controller, f"{line}\n".encode())
        assert process.wait(30) == 0
        seen += read_rest(controller)
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    told = seen.decode(errors="replace").replace("\r\n", "\n")
    for text in (first, second, afresh):
        assert re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) in told  # what a terminal would obey is not shown
    assert "* base\n  one\n" in told
    assert "/system TEXT" in told


def read_until(controller: int, end: bytes) -> bytes:
    seen, until = b"", time.monotonic() + 60
    while not seen.endswith(end):
        assert time.monotonic() < until, seen
        if select.select([controller], [], [], 0.1)[0]:
            seen += os.read(controller, 4096)
    return seen


def read_rest(controller: int) -> bytes:
    seen = b""
    while select.select([controller], [], [], 0.5)[0]:
        try:
            piece = os.read(controller, 4096)
        except OSError:  # the other side has closed
            break
        if not piece:
            break
        seen += piece
    return seen


@pytest.mark.parametrize(
    ("words", "key", "status", "said"),
    [
        (("-m", "none"), None, 1, "does not exist"),
        ((), "lk_wrong-and-long-enough", 1, "HTTP 401"),
        (("--url", "http://127.0.0.1:9/v1"), None, 1, "does not answer"),
    ],
)
def test_refusals_are_told(server: Server, words: tuple[str, ...], key: str | None, status: int, said: str) -> None:
    url = () if "--url" in words else ("--url", server.url)
    found = run(server, "chat", *url, *words, *(("--key", key) if key else ()), stdin=PROMPT)
    assert found.returncode == status
    assert said in " ".join(found.stderr.split())


def test_without_a_key_nothing_is_asked(luthier, monkeypatch) -> None:
    monkeypatch.delenv("LUTHIER_API_KEY", raising=False)
    for words in (("chat",), ("bench-serve",)):
        said = luthier(*words)
        assert said.status == 2 and "LUTHIER_API_KEY" in said.err


def test_bench_serve_counts_what_happened(server: Server) -> None:
    words = ("--requests", 30, "--clients", 4, "--max-tokens", 6, "--leave", 0.2, "--hang-up", 0.1, "--zipf", 1, "--json")
    said = run(server, "bench-serve", "--url", server.url, *words)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["requests"] == 30 == sum(found["ended"].values())
    assert found["ended"]["left"] > 0 and found["ended"]["answered"] > 0 and not found["statuses"] and not found["errors"]
    assert found["models"] == 2 and found["tokens"] > 0
    for name in ("first_token_s", "token_s", "request_s"):
        assert 0 <= found[name]["p50"] <= found[name]["p95"] <= found[name]["p99"]


def test_bench_serve_says_it_in_a_table(server: Server, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"prompt": "plane"}) + "\n" + json.dumps({"messages": [{"role": "user", "content": "glue"}]}) + "\n"
    )
    said = run(server, "bench-serve", "--url", server.url, "--requests", 3, "--prompts", prompts, "-m", "one", "--max-tokens", 4)
    assert said.returncode == 0, said.stderr
    assert "3 requests" in said.stdout and "3 answered" in said.stdout and "tokens/s" in said.stdout
    wrong = run(server, "bench-serve", "--url", server.url, "-m", "none", "--requests", 1)
    assert wrong.returncode == 1 and "none" in wrong.stderr and "base, one" in wrong.stderr
