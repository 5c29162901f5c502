"""A contender in a long-lived process of its own: told over a pipe what to run, held still while it is not its turn.

Both ends are here. The far end may be another Python with other packages (vLLM's environment), so that importing this file needs
the standard library and psutil only. One line of JSON is one call or one answer.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

Engine = Any
"""What a maker returns: `facts` (a dict) and `run(requests, max_new_tokens)`, which returns an answer for each request."""


class ContenderError(RuntimeError):
    """A contender could not be started, or died; the message is the last it said."""


class Contender:
    """The near end. `ask` wakes the process and all it started, passes one call, and holds them still again.

    Held still (SIGSTOP) rather than trusted to be idle: a server's workers may spin while they wait, which the next in turn
    would pay for.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        try:
            self.facts = self.ask("load")
        except ContenderError:
            self.close()
            raise

    def ask(self, what: str, **given: Any) -> dict[str, Any]:
        """Return the answer to one call, with the processor seconds of all its processes. Raises: ContenderError."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._signal(signal.SIGCONT)
        before = self._cpu_seconds()
        try:
            self._process.stdin.write(json.dumps({"what": what} | given) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ContenderError(f"{self.name} ended without an answer; {self.log} ends with:\n{self.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        answer["cpu_seconds"] = self._cpu_seconds() - before
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise ContenderError(f"{self.name}: {answer['error']}")
        return answer

    def memory(self) -> dict[str, float]:
        """Return in GiB its processes' peaks added up (shared pages count in each), and what they hold now (shared ones once)."""
        peak = held = 0
        for each in self._family():
            with contextlib.suppress(psutil.Error, OSError, StopIteration):
                status = Path(f"/proc/{each.pid}/status").read_text().splitlines()
                peak += 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
                held += each.memory_full_info().pss
        return {"peak_gib": peak / 2**30, "held_gib": held / 2**30}

    def close(self) -> None:
        """End the process and all it started."""
        family = self._family()
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        _, left = psutil.wait_procs(family, timeout=20)
        for each in left:
            with contextlib.suppress(psutil.Error):
                each.kill()
        self._process.wait()
        self._process.stdout.close()

    def _family(self) -> list[psutil.Process]:
        try:
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        except psutil.Error:
            return []

    def _signal(self, number: int) -> None:
        for each in self._family():
            with contextlib.suppress(psutil.Error):
                each.send_signal(number)

    def _cpu_seconds(self) -> float:
        total = 0.0
        for each in self._family():
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                total += times.user + times.system
        return total


def answer_calls(make: Callable[[dict[str, Any]], Engine], plan: Path) -> None:
    """The far end: make the engine of `plan` when told to, and run what is asked until the pipe is closed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    engine: Engine = None
    for line in sys.stdin:
        call = json.loads(line)
        began = time.perf_counter()
        try:
            if call["what"] == "load":
                engine = make(json.loads(plan.read_text()))
                answer = engine.facts | {"load_seconds": time.perf_counter() - began}
            else:
                rows = engine.run(call["requests"], call["max_new_tokens"])
                answer = {"seconds": time.perf_counter() - began, "rows": rows}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # nothing is left to do, and some engines take half a minute to take themselves apart
