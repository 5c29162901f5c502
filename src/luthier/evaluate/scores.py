"""What a model scored on a suite, item by item: what the runner hands to the gate, and what is kept on disk to be paired later.

Plain data, no torch. Never decides anything.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from luthier.core.atomic import write_atomic
from luthier.core.errors import DataError

Kind = Literal["task", "capability", "drift"]
Scale = Literal["binary", "graded", "nats"]
FORMAT = 1


@dataclass(frozen=True)
class ItemScore:
    """One item's score.

    `score` is 0 or 1 (binary), 0 to 1 (graded), both higher is better, or the mean negative log likelihood per token (nats,
    lower is better). `cluster` names what items were drawn together (a source document, a paradigm, a subject).
    """

    id: str
    score: float
    cluster: str
    slices: tuple[str, ...] = ()
    output: str | None = None


@dataclass(frozen=True)
class SuiteScores:
    """All items of one suite for one contestant. Two can be paired if `suite`, `digest`, `metric` and the ids are equal."""

    suite: str
    digest: str
    kind: Kind
    metric: str
    scale: Scale
    items: tuple[ItemScore, ...]

    @property
    def mean(self) -> float:
        """The plain mean over items."""
        return sum(item.score for item in self.items) / len(self.items)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        items = [
            {"id": item.id, "score": item.score, "cluster": item.cluster, "slices": list(item.slices), "output": item.output}
            for item in self.items
        ]
        described = {"suite": self.suite, "digest": self.digest, "kind": self.kind, "metric": self.metric, "scale": self.scale}
        return {"format": FORMAT, **described, "items": items}

    @classmethod
    def from_dict(cls, known: dict[str, Any]) -> "SuiteScores":
        """Read back what `as_dict` gave. Raises: DataError if it is not such a thing."""
        if known.get("format") != FORMAT:
            raise DataError(f"scores of format {known.get('format')!r} were given; this luthier reads format {FORMAT}")
        try:
            items = tuple(
                ItemScore(each["id"], float(each["score"]), each["cluster"], tuple(each["slices"]), each["output"])
                for each in known["items"]
            )
            return cls(known["suite"], known["digest"], known["kind"], known["metric"], known["scale"], items)
        except (KeyError, TypeError, ValueError) as fault:
            raise DataError(f"these are not the scores of a suite: {fault!r} is missing or wrong") from fault


@dataclass(frozen=True)
class Contestant:
    """All suites of one contestant, and who it is as far as that is known."""

    suites: tuple[SuiteScores, ...]
    adapter: str | None = None
    manifest_digest: str | None = None
    fingerprint: Any = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        who = {"adapter": self.adapter, "manifest_digest": self.manifest_digest, "fingerprint": self.fingerprint}
        return {"format": FORMAT, **who, "suites": [suite.as_dict() for suite in self.suites]}


def write_scores(path: str | Path, contestant: Contestant) -> None:
    """Write a contestant's scores to a JSON file, whole or not at all. Raises: StorageError."""
    write_atomic(Path(path), json.dumps(contestant.as_dict(), ensure_ascii=False, allow_nan=False))


def read_scores(path: str | Path) -> Contestant:
    """Read what `write_scores` wrote; a plain list of suites, or one under "candidate" or "base", is read too.

    Raises: DataError for a file that cannot be read or holds no scores, with the faults of all its suites.
    """
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"the scores in {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    who = known if isinstance(known, dict) else {}
    lists = (
        [known] if isinstance(known, list) else [who[key] for key in ("suites", "candidate", "base", "incumbent") if key in who]
    )
    if len(lists) != 1 or not isinstance(lists[0], list) or not lists[0]:
        raise DataError(f"{path} holds no scores; needed: a list of suites, or one under 'suites', 'candidate' or 'base'")
    suites, faults = [], []
    for number, each in enumerate(lists[0]):
        try:
            if not isinstance(each, dict):
                raise DataError(f"a suite is an object, not {each!r:.40}")
            suites.append(SuiteScores.from_dict(each))
        except DataError as error:
            faults.append(f"  suite {number}: {error}")
    if faults:
        raise DataError("\n".join([f"{path} has {len(faults)} suites that cannot be read:", *faults]))
    return Contestant(tuple(suites), *(who.get(key) for key in ("adapter", "manifest_digest", "fingerprint")))
