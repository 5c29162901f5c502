"""The process that a tracker lives in: `python -m luthier.train.tracking.child KIND`. Loads no torch.

It reads lines of JSON from stdin ({"begin": ...}, {"record": ...}, {"finish": ...}) and answers on stdout with a line after each
thing done, the last of which is its report. What libraries print goes to stderr, which is a file. Where stdin ends without
a "finish" the run was killed, and the tracker is told that it failed.
"""

import importlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.train.tracking.base import Record, RunFacts, Status, Tracker

CLASSES = {"mlflow": "Mlflow", "wandb": "Wandb", "tensorboard": "TensorBoard", "trackio": "Trackio"}
# Figures about their users that these packages send home of their own accord.
OPT_OUT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
AT_ONCE = 100
MOST_WAITING = 10_000
"""Lines that are kept for a tracker that is down; the oldest go first."""
RETRY_SECONDS = 10.0
NICENESS = 10
LONGEST_FAULT = 300


class Carrier:
    """Passes lines on to a tracker, and keeps them while it fails."""

    def __init__(self, make: Callable[[], Tracker], answer: Callable[[dict[str, Any]], None], clock: Callable[[], float]):
        self.make, self.answer, self.clock = make, answer, clock
        self.tracker: Tracker | None = None
        self.facts = RunFacts("", "")
        self.note = Path()
        self.run_id: str | None = None
        self.is_open = False
        self.waiting: deque[Record] = deque()
        self.delivered = self.lost = 0
        self.fault = ""
        self.failed_at: float | None = None

    def begin(self, facts: RunFacts, note: Path, run_id: str | None) -> None:
        """Take in what the run is; `note` is the file that its id in the tracker is kept in."""
        self.facts, self.note, self.run_id = facts, note, run_id
        self.try_again()

    def take(self, record: Record) -> None:
        """Keep a line until it is passed on."""
        if len(self.waiting) == MOST_WAITING:
            self.waiting.popleft()
            self.lost += 1
        self.waiting.append(record)

    def try_again(self) -> None:
        """Pass on what waits, unless the last failure was a moment ago."""
        if self.failed_at is None or self.clock() - self.failed_at >= RETRY_SECONDS:
            self.attempt(self._pass_on)

    def finish(self, status: Status, artifacts: list[Path]) -> dict[str, Any]:
        """Pass on all that is left, then files and status, up to the first failure; return the report."""
        assert status in ("finished", "interrupted", "failed")

        def close() -> None:
            self._pass_on()
            assert self.tracker is not None
            for path in artifacts:
                self.tracker.artifact(path)
                self._answer()
            self.tracker.finish(status)

        is_closed = self.attempt(close)
        return {
            "id": self.run_id,
            "is_closed": is_closed,
            "delivered": self.delivered,
            "lost": self.lost + len(self.waiting),
            "fault": self.fault,
        }

    def attempt(self, action: Callable[[], None]) -> bool:
        """Do something to the tracker; return whether it went well. A fault is kept until something goes well again."""
        try:
            action()
        except Exception as error:
            sys.excepthook(*sys.exc_info())  # whole, in the file that stderr is
            self.fault = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_FAULT]
            self.failed_at = self.clock()
            return False
        self.failed_at, self.fault = None, ""
        return True

    def _pass_on(self) -> None:
        if self.tracker is None:
            self.tracker = self.make()
        if not self.is_open:
            self.run_id = self.tracker.begin(self.facts, self.run_id)
            self.is_open = True
            write_atomic(self.note, json.dumps({"id": self.run_id}))
            self._answer()
        while self.waiting:
            records = [self.waiting[index] for index in range(min(AT_ONCE, len(self.waiting)))]
            self.tracker.log(records)
            for _ in records:
                self.waiting.popleft()
            self.delivered += len(records)
            self._answer()

    def _answer(self) -> None:
        self.answer({"delivered": self.delivered})


def carry(carrier: Carrier, arrivals: Iterator[list[dict[str, Any]]]) -> dict[str, Any]:
    """Do what the messages say until there are no more; return the report."""
    for messages in arrivals:
        for message in messages:
            if "begin" in message:
                carrier.begin(RunFacts(**message["begin"]), Path(message["note"]), message["id"])
            elif "record" in message:
                carrier.take(Record(*message["record"]))
            else:
                return carrier.finish(message["finish"], [Path(path) for path in message["artifacts"]])
        carrier.try_again()
    return carrier.finish("failed", [])


def arriving(handle: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of a pipe, as many at once as have arrived."""
    rest = b""
    while chunk := os.read(handle, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        if lines:
            yield [json.loads(line) for line in lines]


def main() -> None:
    """Serve one tracker until the run ends."""
    kind = sys.argv[1]
    messages, answers = os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # who asks a question here (a login) gets no answer, instead of a line of ours
    os.dup2(2, 1)
    os.nice(NICENESS)  # the run comes first
    os.environ.update(OPT_OUT)
    # Not at the head of this file: a package that is missing or broken is a fault to be told like any other.
    make = lambda: getattr(importlib.import_module(f"luthier.train.tracking.{kind}"), CLASSES[kind])()  # noqa: E731

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")

    answer({"report": carry(Carrier(make, answer, time.monotonic), arriving(messages))})
    answers.flush()
    # Past their exit handlers, which may wait for a server; what had to be written has been.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
