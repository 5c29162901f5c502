"""Ledger: every answer that ended becomes one event in the registry, whoever dies in between, and none becomes two.

    record     a line in the journal, before the last piece of the answer is sent (journal.py)
    send       sealed files go to the registry in batches, oldest first; a file is removed once all of it is there
    start      what an earlier life of this server left is sent first

A batch whose answer was lost is sent again: the registry adds an event once for its id. While the registry is away events are
kept; when the journal is full, no new request is taken (`fault`). Events that the registry refuses for good, as those of a tenant
that was deleted, are set aside in refused.jsonl, so that they hold up nobody else's.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Protocol

from luthier.core.errors import StorageError
from luthier.serve.background import Repeating, Worker, is_away
from luthier.serve.journal import Journal

log = logging.getLogger(__name__)
BATCH = 500
SEND_SECONDS = 1.0
SUMS_SECONDS = 5.0


@dataclass(frozen=True)
class Answered:
    """One answer that ended, by whatever end; `status` is how. `unit_digest` (hexadecimal) is the unit of an experiment's arm."""

    request_id: str
    tenant_id: int
    key_id: int
    version_id: int | None
    model: str
    surface_id: int | None
    experiment_id: int | None
    epoch: int | None
    unit_digest: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    status: str
    finished_at: datetime

    @property
    def tokens(self) -> int:
        """What counts for quotas."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def day(self) -> date:
        """The day (UTC) that it counts for."""
        return self.finished_at.astimezone(UTC).date()

    def as_line(self) -> dict[str, Any]:
        """Return plain JSON."""
        return asdict(self) | {"finished_at": self.finished_at.astimezone(UTC).isoformat()}

    @classmethod
    def from_line(cls, line: Mapping[str, Any]) -> "Answered":
        """Return what `as_line` wrote. Raises: ValueError, KeyError or TypeError for anything else."""
        return cls(**dict(line) | {"finished_at": datetime.fromisoformat(line["finished_at"])})


class Books(Protocol):
    """Where answers are written down for good. Both calls may block, and raise while it is away."""

    def add(self, answers: Sequence[Answered]) -> None:
        """Add those that are not there yet, all or none."""

    def tokens_of(self, day: date) -> Mapping[int, int]:
        """Return each tenant's tokens on a day."""
        ...


class Ledger:
    """The journal of one server and the registry's books. `synced` is told each time what the registry knows of today."""

    def __init__(
        self,
        folder: Path,
        books: Books,
        *,
        send_seconds: float = SEND_SECONDS,
        max_bytes: int | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        synced: Callable[[date, Mapping[int, int], Mapping[int, int]], None] = lambda *_: None,
    ):
        self.journal = Journal(folder) if max_bytes is None else Journal(folder, max_bytes=max_bytes)
        self._books, self._now, self._synced = books, now, synced
        self._worker = Worker("ledger")
        self._repeating = Repeating("sending usage to the registry", send_seconds, self.send)
        self._sums_every = max(1, round(SUMS_SECONDS / send_seconds))
        self._turn = 0
        self._unsent: Counter[tuple[date, int]] = Counter()
        self._reached: dict[Path, int] = {}
        self._unwritten: list[Answered] = []
        self.away_because: str | None = None
        self.sent = 0

    def fault(self) -> str | None:
        """Return why no new request should be taken, since its usage could not be written down; None where it can."""
        if self._unwritten:
            return "usage cannot be written to the disk"
        return "the journal of usage is full; the registry has not taken any of it for long" if self.journal.is_full else None

    def record(self, answer: Answered) -> None:
        """Write an answer down. Never raises: where the disk refuses it is kept in memory and tried again."""
        self._unsent[answer.day, answer.tenant_id] += answer.tokens
        try:
            self.journal.append(answer.as_line())
        except StorageError:
            log.exception("usage is kept in memory until it can be written")
            self._unwritten.append(answer)

    async def start(self) -> None:
        """Count what an earlier life left, and begin to send."""
        for path in self.journal.sealed():
            for answer in _read(self.journal, path):
                self._unsent[answer.day, answer.tenant_id] += answer.tokens
        self._repeating.start()

    async def send(self) -> None:
        """Send what is there. While the registry is away nothing is lost, and nothing raised."""
        self._write_again()
        if not self.journal.sealed() or self.away_because is None:
            self.journal.seal()
        self._turn += 1
        paths = self.journal.sealed()
        if not paths and self._turn % self._sums_every != 1 % self._sums_every:
            return
        try:
            for path in paths:
                answers = await self._worker.do(self._send_file, path)
                self.journal.drop(path)
                self._reached.pop(path, None)
                self.sent += len(answers)
                for answer in answers:
                    self._unsent[answer.day, answer.tenant_id] -= answer.tokens
            await self._sync()
        except Exception as error:
            if not is_away(error):
                raise
            if self.away_because is None:
                log.warning("the registry is out of reach; usage is kept in %s: %s", self.journal.folder, error)
            self.away_because = str(error)
            return
        if self.away_because is not None:
            log.warning("the registry is back and has all usage")
            self.away_because = None

    async def close(self) -> None:
        """Send what can be sent, and let go of the journal; what could not be sent is sent at the next start."""
        await self._repeating.close()
        await self.send()
        self._worker.close()
        self.journal.close()

    async def _sync(self) -> None:
        today = self._now().astimezone(UTC).date()
        recorded = await self._worker.do(self._books.tokens_of, today)
        for key in [key for key, tokens in self._unsent.items() if not tokens]:
            del self._unsent[key]
        self._synced(today, recorded, {tenant: tokens for (day, tenant), tokens in self._unsent.items() if day == today})

    def _write_again(self) -> None:
        while self._unwritten:
            try:
                self.journal.append(self._unwritten[0].as_line())
            except StorageError:
                return
            del self._unwritten[0]

    def _send_file(self, path: Path) -> list[Answered]:
        answers = _read(self.journal, path)
        for start in range(self._reached.get(path, 0), len(answers), BATCH):
            self._reached[path] = start  # a try that fails later goes on here
            batch = answers[start : start + BATCH]
            try:
                self._books.add(batch)
            except Exception as error:
                if is_away(error):
                    raise
                self._add_each(batch)
        return answers

    def _add_each(self, batch: Sequence[Answered]) -> None:
        """One of them is at fault: add the others, and set it aside."""
        for answer in batch:
            try:
                self._books.add([answer])
            except Exception as error:
                if is_away(error):
                    raise
                log.exception("the registry refuses the usage of request %s; it is set aside", answer.request_id)
                _set_aside(self.journal.folder / "refused.jsonl", answer)


def _read(journal: Journal, path: Path) -> list[Answered]:
    answers = []
    for line in journal.read(path):
        try:
            answers.append(Answered.from_line(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            log.exception("%s holds a line that is no usage; it is left out", path)
    return answers


def _set_aside(path: Path, answer: Answered) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as file:
        file.write(json.dumps(answer.as_line()) + "\n")
