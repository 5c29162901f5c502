"""Put two contestants' scores beside each other, item by item, or refuse with every reason why they cannot be compared.

Legend: n items, all arrays are (n,).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from luthier.core.errors import DataError
from luthier.evaluate.policy import Policy
from luthier.evaluate.scores import Kind, Scale, SuiteScores

Against = Literal["base", "incumbent"]
_RANGES = {"binary": (0.0, 1.0), "graded": (0.0, 1.0), "nats": (0.0, float("inf"))}


@dataclass(frozen=True)
class Pair:
    """One suite of the candidate and of a baseline, in the same order of items; items left out are in neither."""

    suite: SuiteScores
    against: Against
    ids: tuple[str, ...]
    candidate: Any
    baseline: Any
    clusters: Any
    slices: tuple[tuple[str, ...], ...]

    @property
    def gains(self) -> Any:
        """How much better the candidate is at each item: higher is better in every scale, nats included."""
        return self.baseline - self.candidate if self.suite.scale == "nats" else self.candidate - self.baseline

    @cached_property
    def members(self) -> dict[str, Any]:
        """The places of the items of each slice, by its name."""
        places: dict[str, list[int]] = {}
        for place, names in enumerate(self.slices):
            for name in dict.fromkeys(names):
                places.setdefault(name, []).append(place)
        return {name: np.array(found) for name, found in sorted(places.items())}

    def part(self, places: Any) -> "Pair":
        """Return the pair of only these items."""
        return Pair(
            self.suite,
            self.against,
            tuple(self.ids[place] for place in places),
            self.candidate[places],
            self.baseline[places],
            self.clusters[places],
            tuple(self.slices[place] for place in places),
        )


def pair_all(
    candidate: Sequence[SuiteScores],
    baselines: Mapping[Against, Sequence[SuiteScores]],
    policy: Policy,
    contaminated: Mapping[str, Collection[str]],
) -> list[Pair]:
    """Return each suite of the candidate paired with each baseline's, without the items that are `contaminated` (by suite).

    Raises: DataError with all faults: what does not match, what the policy asks for and was not run, impossible scores.
    """
    contestants = {"the candidate": candidate} | {f"the {name}": suites for name, suites in baselines.items()}
    faults = [fault for who, suites in contestants.items() for fault in _own_faults(who, suites)]
    faults += missing_suites({suite.suite: suite.kind for suite in candidate}, policy)
    pairs = []
    for against, suites in baselines.items():
        theirs = {suite.suite: suite for suite in suites}
        faults += [
            f"suite '{name}': the candidate has no scores" for name in sorted(set(theirs) - {mine.suite for mine in candidate})
        ]
        for mine in candidate:
            other = theirs.get(mine.suite)
            found = [f"the {against} has no scores"] if other is None else _differences(mine, other, f"the {against}")
            faults += [f"suite '{mine.suite}': {fault}" for fault in found]
            if other is not None and not found:
                pairs.append(_pair(mine, other, against, contaminated.get(mine.suite, ())))
    faults += [f"suite '{pair.suite.suite}': every item was found in the training data" for pair in pairs if not pair.ids]
    if faults:
        listed = "\n".join(f"  {fault}" for fault in dict.fromkeys(faults))
        raise DataError(f"these scores cannot be judged ({len(dict.fromkeys(faults))} faults):\n{listed}")
    return pairs


def _own_faults(who: str, suites: Sequence[SuiteScores]) -> list[str]:
    """What is wrong with one contestant's scores, whoever it is compared with."""
    faults = []
    for name, count in Counter(suite.suite for suite in suites).items():
        if count > 1:
            faults.append(f"suite '{name}': {who} has it {count} times")
    for suite in suites:
        found = []
        if suite.kind not in get_args(Kind) or suite.scale not in get_args(Scale):
            found.append(f"kind '{suite.kind}' with scale '{suite.scale}' is unknown")
        else:
            low, high = _RANGES[suite.scale]
            scores = np.array([item.score for item in suite.items])
            fits = np.isfinite(scores) & (scores >= low) & (scores <= high)
            if suite.scale == "binary":
                fits &= (scores == 0) | (scores == 1)
            if not fits.all():
                first = suite.items[int(np.argmin(fits))]
                found.append(f"{int((~fits).sum())} scores are not {suite.scale}, the first {first.score} of item '{first.id}'")
            if (suite.kind == "drift") > (suite.scale == "nats"):
                found.append(f"drift is measured in nats, not in scale '{suite.scale}'")
        if not suite.items:
            found.append("there are no items")
        ids = [item.id for item in suite.items]
        if len(set(ids)) < len(ids):
            repeated = [name for name, count in Counter(ids).items() if count > 1]
            found.append(f"{len(repeated)} ids name more than one item, such as '{repeated[0]}'")
        faults += [f"suite '{suite.suite}', {who}: {fault}" for fault in found]
    return faults


def missing_suites(kinds: Mapping[str, Kind], policy: Policy) -> list[str]:
    """Return in words what the policy asks for and the suites, given as name -> kind, do not hold."""
    asked = f"policy '{policy.name}' asks for"
    faults = [f"{asked} a suite of kind '{kind}', which no suite here is" for kind in policy.kinds if kind not in kinds.values()]
    faults += [f"{asked} the suite '{name}', which was not run" for name in policy.suites if name not in kinds]
    floors = [floor for floor in policy.floors if floor.suite is not None and floor.suite not in kinds]
    return faults + [f"{asked} a floor for {floor.about}, which was not run" for floor in floors]


def _differences(mine: SuiteScores, other: SuiteScores, who: str) -> list[str]:
    """Why two suites of one name cannot be paired."""
    faults = []
    for field in ("digest", "kind", "metric", "scale"):
        ours, theirs = getattr(mine, field), getattr(other, field)
        if ours != theirs:
            faults.append(f"its {field} is '{ours[:16]}' for the candidate and '{theirs[:16]}' for {who}")
    clusters = {item.id: item.cluster for item in other.items}
    ids = {item.id for item in mine.items}
    alone = [
        f"{len(only)} items only for {owner}"
        for only, owner in ((ids - set(clusters), "the candidate"), (set(clusters) - ids, who))
        if only
    ]
    if alone:
        faults.append(" and ".join(alone))
    elif moved := [item.id for item in mine.items if clusters[item.id] != item.cluster]:
        faults.append(f"{len(moved)} items are in other clusters for {who}, such as '{moved[0]}'")
    return faults


def _pair(mine: SuiteScores, other: SuiteScores, against: Against, left_out: Collection[str]) -> Pair:
    scores = {item.id: item.score for item in other.items}
    items = [item for item in mine.items if item.id not in left_out] if left_out else list(mine.items)
    codes: dict[str, int] = {}
    return Pair(
        mine,
        against,
        tuple(item.id for item in items),
        np.array([item.score for item in items]),
        np.array([scores[item.id] for item in items]),
        np.array([codes.setdefault(item.cluster, len(codes)) for item in items], dtype=int),
        tuple(item.slices for item in items),
    )
