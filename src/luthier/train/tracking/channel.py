"""The training process's end of a tracker: a bounded queue, two threads, and a process that may be left behind."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.core.atomic import write_atomic
from luthier.train.tracking.base import Record, RunFacts, Status

log = logging.getLogger(__name__)

CAPACITY = 10_000
"""Lines that wait here for a tracker that does not keep up; later ones are dropped and counted."""
UPLOAD_BYTES_PER_S = 1e6
"""An artefact may take as long as this at the end before its tracker counts as silent."""


@dataclass(frozen=True)
class Report:
    """What became of a run in one tracker. `fault` is empty where all of it arrived."""

    tracker: str
    id: str | None
    delivered: int
    lost: int
    fault: str

    def __str__(self) -> str:
        if not self.fault:
            return f"{self.tracker}: {self.delivered} lines, run {self.id}"
        total = self.delivered + self.lost
        return f"{self.tracker} did not take everything ({self.delivered} of {total} lines arrived): {self.fault}"


class Channel:
    """Sends one run to one tracker. No method but `wait` ever waits for anything."""

    def __init__(self, kind: str, facts: RunFacts, *, capacity: int = CAPACITY):
        self.kind, self.capacity = kind, capacity
        folder = Path(facts.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.note, self.said = folder / f"{kind}.json", folder / f"{kind}.log"
        self.sent = 0
        self.dropped = 0
        self.delivered = 0
        self.report: dict[str, Any] | None = None
        self.answered_at = time.monotonic()
        self.artifact_bytes = 0
        begin = {"begin": asdict(facts), "note": str(self.note.absolute()), "id": self._known_id()}
        self.waiting: deque[dict[str, Any]] = deque([begin])
        self.last: dict[str, Any] | None = None
        self.changed = threading.Condition()
        with self.said.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.child", kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,  # Ctrl-C is for the run, which tells its trackers how it ended
            )
        self.threads = [threading.Thread(target=each, name=f"track-{kind}", daemon=True) for each in (self._write, self._read)]
        for thread in self.threads:
            thread.start()

    def send(self, record: Record) -> None:
        """Queue a line, or count it as dropped where too many wait."""
        with self.changed:
            if len(self.waiting) >= self.capacity:
                self.dropped += 1
                return
            self.sent += 1
            self.waiting.append({"record": [record.step, record.time, dict(record.figures)]})
            self.changed.notify()

    def finish(self, status: Status, artifacts: Sequence[Path]) -> None:
        """Say how the run ended, and what is to be kept of it."""
        self.artifact_bytes = sum(_bytes_of(path) for path in artifacts)
        with self.changed:
            self.last = {"finish": status, "artifacts": [str(path.absolute()) for path in artifacts]}
            self.answered_at = time.monotonic()
            self.changed.notify()

    def wait(self, patience: float) -> Report:
        """Wait until the tracker has everything, or leave it after `patience` seconds without a sign of life."""
        allowed = patience + self.artifact_bytes / UPLOAD_BYTES_PER_S
        is_silent = False
        reader = self.threads[1]
        while reader.is_alive() and not is_silent:
            left = self.answered_at + allowed - time.monotonic()
            is_silent = left <= 0
            reader.join(max(left, 0))
        if is_silent:
            self.kill()
        self.process.wait()
        return self._told(allowed if is_silent else None)

    def kill(self) -> None:
        """End the tracker's process at once, whatever it is at."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _told(self, silent_seconds: float | None) -> Report:
        found = self.report or {
            "id": self._known_id(),
            "delivered": self.delivered,
            "lost": self.sent - self.delivered,
            "fault": "",
        }
        fault = found["fault"]
        if silent_seconds is not None:
            fault = f"no answer for {silent_seconds:.0f} s at the end, so it was left"
        elif self.report is None:
            fault = f"its process ended by itself, see {self.said}"
        elif self.dropped or found["lost"]:
            fault = fault or "it was too slow, so lines were dropped"
        told = Report(self.kind, found["id"], found["delivered"], found["lost"] + self.dropped, fault)
        with suppress(OSError):
            write_atomic(self.note, json.dumps(asdict(told), indent=2))
        return told

    def _known_id(self) -> str | None:
        """Return the id that the run has in the tracker, where it is one that goes on."""
        try:
            known = json.loads(self.note.read_text())["id"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return known if isinstance(known, str) else None

    def _write(self) -> None:
        assert self.process.stdin is not None
        with suppress(OSError), self.process.stdin as pipe:  # OSError: the process is gone, which `wait` tells
            while True:
                with self.changed:
                    while not self.waiting and self.last is None:
                        self.changed.wait()
                    messages = list(self.waiting)
                    self.waiting.clear()
                    last = self.last
                if last is not None:
                    messages.append(last)
                pipe.write("".join(json.dumps(message) + "\n" for message in messages).encode())
                pipe.flush()
                if last is not None:
                    return

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            for line in pipe:
                self.answered_at = time.monotonic()
                answer = json.loads(line)
                self.report = answer.get("report")
                self.delivered = answer.get("delivered", self.delivered)


def _bytes_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
