"""Every curl command on a page is answered by a real server as the page says: the commands are cut out and run."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve_command import Server, luthier_serve
from tests.served_adapters import save_random_adapter
from tests.tiny_run import save_tiny_model
from transformers import AutoModelForCausalLM

from luthier.adapt import detach

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PORT = "http://127.0.0.1:8000"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KEY = "a-key-of-some-length"


def curl_commands(text: str) -> list[str]:
    """The curl commands in a page's blocks of shell, each whole."""
    blocks = BLOCK.findall(text)
    return [command.strip() for block in blocks for command in re.split(r"^(?=curl )", block, flags=re.MULTILINE) if command]


FOUND = [(page, command) for page in PAGES for command in curl_commands(page.read_text())]


def test_the_readme_has_curl_examples() -> None:
    commands = [command for page, command in FOUND if page.name == "README.md"]
    assert len(commands) >= 3 and all(command.startswith(f"curl {PORT}/v1/") for command in commands)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any], tiny_tokenizer: Any) -> Iterator[Server]:
    """A tiny base with the adapter that the pages name."""
    folder = tmp_path_factory.mktemp("curl")
    save_tiny_model(folder / "base", tiny_llama, tiny_tokenizer, max_position_embeddings=1024)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    save_random_adapter(folder / "orders", model, 0)
    detach(model)
    words = ("-a", f"orders={folder / 'orders'}", "--dtype", "float32", "--threads", 1)
    with luthier_serve(folder / "base", *words, folder=folder, LUTHIER_API_KEY=KEY) as running:
        yield running


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
@pytest.mark.parametrize(("page", "command"), FOUND, ids=[f"{page.stem}-{number}" for number, (page, _) in enumerate(FOUND)])
def test_a_curl_example_is_answered(page: Path, command: str, server: Server, tmp_path: Path) -> None:
    assert PORT in command
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nfail-with-body\nmax-time = 60\n")
    environment = os.environ | {"CURL_HOME": str(tmp_path), "LUTHIER_API_KEY": KEY}
    run = subprocess.run(
        ["bash", "-ec", command.replace(PORT, server.url.removesuffix("/v1"))],
        env=environment, capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    if '"stream": true' in command:
        lines = [line for line in run.stdout.splitlines() if line]
        assert lines[-1] == "data: [DONE]" and all(json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    else:
        answer = json.loads(run.stdout)
        assert answer.get("choices") or answer.get("data"), answer
        if "json_schema" in command:
            assert json.loads(answer["choices"][0]["message"]["content"])["item"] in ("piano", "violin")
