"""`luthier serve` as a process of its own, as an operator starts it."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tests.tiny_run import ENVIRONMENT, command


@dataclass(frozen=True)
class Server:
    """A server that takes requests: what it said of itself, and its process. `log` is where its words went."""

    told: dict[str, Any]
    process: "subprocess.Popen[str]"
    log: Path

    @property
    def url(self) -> str:
        return str(self.told["url"])

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.told['key']}"}

    @property
    def engine(self) -> psutil.Process:
        """The engine's process."""
        [child] = psutil.Process(self.process.pid).children()
        return child


@contextmanager
def luthier_serve(*words: object, folder: Path, **environment: str) -> Iterator[Server]:
    """Start `luthier serve` on a free port, wait until it is ready, and end it with the block."""
    log = folder / f"serve-{time.monotonic_ns()}.log"
    variables = {name: value for name, value in os.environ.items() if name != "LUTHIER_API_KEY"}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command("serve", *words, "--port", 0, "--json"),
            cwd=folder,
            env=variables | ENVIRONMENT | {"LUTHIER_HOME": str(folder / "home")} | environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line == "}\n":
                break
        assert lines and lines[-1] == "}\n", log.read_text()
        yield Server(json.loads("".join(lines)), process, log)
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()
