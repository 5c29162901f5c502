"""What a model scored on a suite, item by item: what the runner hands to the gate, and what is kept on disk to be paired later.

Plain data, no torch. Never decides anything.
"""

from dataclasses import dataclass
from typing import Any, Literal

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
