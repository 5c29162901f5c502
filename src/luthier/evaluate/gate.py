"""The gate: may this adapter go out? Pass, fail or inconclusive, and why.

    fail           a suite or slice is worse beyond chance (Holm over all of them) and by enough to matter, neutral text has
                   drifted too far, or a floor is broken
    pass           no fail; every suite rules out a drop of its delta, capability suites together one of pooled_delta, task suites
                   show what they must, neutral text has certainly not drifted too far
    inconclusive   anything else: the scores are too few to tell, and it is said how many would decide

Plain numbers in, a report out: never runs a model, never writes a file.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from math import isfinite
from statistics import NormalDist
from typing import Any, Literal

from luthier.core.errors import ConfigError, DataError
from luthier.evaluate.comparison import Comparison, Driver, compare, drivers, lost_items
from luthier.evaluate.pairing import Against, Pair, missing_suites, pair_all
from luthier.evaluate.policy import DEFAULT_POLICY, Policy
from luthier.evaluate.scores import Kind, SuiteScores
from luthier.evaluate.statistics import CONFIDENCE, holm, items_to_decide, pooled_bounds, share

Verdict = Literal["pass", "fail", "inconclusive"]
FORMAT = 1
EXIT_CODES: dict[Verdict, int] = {"pass": 0, "fail": 1, "inconclusive": 3}


@dataclass(frozen=True)
class Subjects:
    """Who is judged. `baseline` in a report is the incumbent's name, or "base" where there is none."""

    adapter: str | None = None
    manifest_digest: str | None = None
    fingerprint: Any = None
    incumbent: str | None = None


@dataclass(frozen=True)
class SuiteResult:
    """What one suite says against one baseline. `p_corrected` is None for drift, which is judged by its size alone.

    `items_to_decide` is how many items of this kind would tell no change from a drop of `delta`, or show the gain or drop that
    was seen; None where the verdict stands, or more of the same would not help.
    """

    suite: str
    kind: str
    metric: str
    scale: str
    against: Against
    comparison: Comparison
    delta: float
    p_corrected: float | None
    verdict: Verdict
    reason: str
    items_to_decide: int | None
    drivers: tuple[Driver, ...]
    lost_items: tuple[str, ...]


@dataclass(frozen=True)
class SliceResult:
    """What one slice of a suite says against one baseline: a fail, or nothing that stands out."""

    suite: str
    slice: str
    scale: str
    against: Against
    comparison: Comparison
    p_corrected: float
    verdict: Verdict


@dataclass(frozen=True)
class PooledResult:
    """The mean difference over all capability suites. `times_items`: how many times the items would decide."""

    against: Against
    suites: int
    difference: float
    low: float
    high: float
    delta: float
    verdict: Verdict
    times_items: float | None


@dataclass(frozen=True)
class FloorResult:
    """A floor and what the candidate reached, with its Wilson interval."""

    suite: str
    minimum: float
    score: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class GateReport:
    """The decision and everything it rests on. `contaminated` counts the items left out, by suite."""

    verdict: Verdict
    policy: Policy
    subjects: Subjects
    suites: tuple[SuiteResult, ...]
    slices: tuple[SliceResult, ...]
    pooled: tuple[PooledResult, ...]
    floors: tuple[FloorResult, ...]
    contaminated: dict[str, int]
    reasons: tuple[str, ...]
    decided_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.verdict]

    @property
    def baseline(self) -> str:
        """The incumbent's name, or "base" where only the base was compared with."""
        has_incumbent = any(result.against == "incumbent" for result in self.suites)
        return (self.subjects.incumbent or "incumbent") if has_incumbent else "base"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; what is not finite is None."""
        known = {
            "format": FORMAT,
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "policy": {"name": self.policy.name, "version": self.policy.version, "digest": self.policy.digest()},
            "baseline": self.baseline,
            "candidate": {"adapter": self.subjects.adapter, "manifest_digest": self.subjects.manifest_digest},
            "base": {"fingerprint": self.subjects.fingerprint},
            "suites": [_flat(result) for result in self.suites],
            "slices": [_flat(result) for result in self.slices],
            "pooled": [_flat(result) for result in self.pooled],
            "floors": [_flat(result) for result in self.floors],
            "contaminated": self.contaminated,
            "reasons": list(self.reasons),
            "decided_at": self.decided_at,
        }
        return _finite(known)


def decide(
    candidate: Sequence[SuiteScores],
    base: Sequence[SuiteScores],
    incumbent: Sequence[SuiteScores] | None = None,
    policy: Policy = DEFAULT_POLICY,
    *,
    contaminated: Mapping[str, Collection[str]] | None = None,
    subjects: Subjects = Subjects(),
) -> GateReport:
    """Judge a candidate against the base, and against the incumbent if there is one, item by item.

    `contaminated` names, by suite, items that were found in the candidate's training data: they are left out and counted.
    Raises: DataError listing everything that keeps the scores from being compared or judged under this policy.
    """
    if policy.incumbent == "required" and incumbent is None:
        raise DataError(_no_incumbent(policy))
    baselines: dict[Against, Sequence[SuiteScores]] = {"base": base}
    if incumbent is not None and policy.incumbent != "ignored":
        baselines["incumbent"] = incumbent
    contaminated = contaminated or {}
    pairs = pair_all(candidate, baselines, policy, contaminated)
    parts = _slices_to_test(pairs, policy)
    alpha_of_slices = policy.alpha * policy.slices.share_of_alpha if parts else 0.0
    suites = _judge_suites(pairs, policy, policy.alpha - alpha_of_slices)
    slices = _judge_slices(parts, policy, alpha_of_slices)
    pooled = tuple(_pool(suites, against, policy) for against in baselines if _poolable(suites, against))
    floors = _judge_floors([pair for pair in pairs if pair.against == "base"], policy)
    left_out = {pair.suite.suite: len(pair.suite.items) - len(pair.ids) for pair in pairs}
    left_out = {name: count for name, count in left_out.items() if count}
    verdicts = {result.verdict for group in (suites, slices, pooled, floors) for result in group}
    verdict: Verdict = "fail" if "fail" in verdicts else "inconclusive" if "inconclusive" in verdicts else "pass"
    reasons = _reasons(suites, slices, pooled, floors, policy)
    reasons += [
        f"note: {count} items of suite {name} were in the training data and are left out" for name, count in left_out.items()
    ]
    if incumbent is not None and policy.incumbent == "ignored":
        reasons.append("note: the policy ignores the incumbent")
    return GateReport(verdict, policy, subjects, suites, slices, pooled, floors, left_out, tuple(reasons))


def check_named(suites: Mapping[str, Kind], policy: Policy, *, has_incumbent: bool) -> None:
    """Raise ConfigError for what `decide` would miss once the suites, given as name -> kind, were run: said before they are."""
    faults = missing_suites(suites, policy)
    if policy.incumbent == "required" and not has_incumbent:
        faults.append(_no_incumbent(policy))
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise ConfigError(f"nothing was run, since it could not be judged ({len(faults)} faults):{listed}")


def _no_incumbent(policy: Policy) -> str:
    return f"policy '{policy.name}' compares with the incumbent too; give the adapter that serves now, or its scores"


def _judge_suites(pairs: Sequence[Pair], policy: Policy, alpha: float) -> tuple[SuiteResult, ...]:
    compared = [compare(pair, policy.seed) for pair in pairs]
    tested = [index for index, pair in enumerate(pairs) if pair.suite.kind != "drift"]
    corrected = dict(zip(tested, holm([compared[index].p_value for index in tested]), strict=True))
    results = []
    for index, (pair, comparison) in enumerate(zip(pairs, compared, strict=True)):
        p = corrected.get(index)
        judged = _judge_drift(comparison, policy) if p is None else _judge_suite(pair, comparison, p, policy, alpha, len(tested))
        suite = pair.suite
        named = (suite.suite, suite.kind, suite.metric, suite.scale, pair.against)
        explained = (drivers(pair), lost_items(pair))
        results.append(SuiteResult(*named, comparison, policy.delta_of(suite), p, *judged, *explained))
    return tuple(results)


def _judge_drift(comparison: Comparison, policy: Policy) -> tuple[Verdict, str, int | None]:
    """Verdict, reason, number of items that would decide."""
    rise, most = -comparison.difference, -comparison.low
    seen = f"neutral text: {rise:+.3f} nats a token (at most {most:+.3f})"
    if rise > policy.drift.fail:
        return "fail", f"{seen}, above {policy.drift.fail:g}", None
    if most > policy.drift.fail or comparison.clusters < policy.min_clusters:
        needed = _items(comparison, policy.drift.fail, policy)
        return "inconclusive", f"{seen} in {comparison.clusters} clusters: may be above {policy.drift.fail:g}", needed
    return "pass", seen + (f", above {policy.drift.warn:g}" if rise > policy.drift.warn else ""), None


def _judge_suite(
    pair: Pair, comparison: Comparison, p: float, policy: Policy, alpha: float, tests: int
) -> tuple[Verdict, str, int | None]:
    """Verdict, reason, number of items that would decide."""
    suite, difference, low = pair.suite, comparison.difference, comparison.low
    seen = f"{amount(difference, suite.scale)} ({comparison.won} won, {comparison.lost} lost of {comparison.n})"
    if p <= alpha and -difference >= policy.min_drop_of(suite):
        return "fail", f"{seen}, p = {p:.2g} after correction for {tests} tests", None
    delta = policy.delta_of(suite)
    rule = policy.task.against_base if pair.against == "base" else policy.task.against_incumbent
    must_improve = suite.kind == "task" and rule == "improve"
    bound = f"lower bound {amount(low, suite.scale)}"
    few = comparison.clusters < policy.min_clusters
    if not few and low > (0.0 if must_improve else -delta):
        return "pass", f"{seen}, {bound}", None
    if few:
        enough = -(-comparison.n * policy.min_clusters // comparison.clusters)
        seen += f", {comparison.clusters} clusters where {policy.min_clusters} are needed"
        return "inconclusive", f"{seen}, {bound}", max(enough, _items(comparison, delta, policy) or 0)
    if must_improve:
        needed = _items(comparison, difference, policy) if difference > 0 else None
        return "inconclusive", f"{seen}, an improvement is asked for, {bound}", needed
    needed = _items(comparison, delta, policy)
    if needed is None and difference < 0:
        needed = _items(comparison, -difference, policy, confidence=1 - alpha / tests)
    return "inconclusive", f"{seen}, {bound} where {amount(-delta, suite.scale)} must be ruled out", needed


def _items(comparison: Comparison, margin: float, policy: Policy, confidence: float = CONFIDENCE) -> int | None:
    """How many items would tell no change from `margin`; None if there are that many already, or nothing can be said."""
    if not isfinite(comparison.standard_error):
        return None
    variance = comparison.n * comparison.standard_error**2
    needed = items_to_decide(variance, margin, confidence=confidence, power=policy.power)
    return needed if needed > comparison.n else None


def _slices_to_test(pairs: Sequence[Pair], policy: Policy) -> list[tuple[str, Pair]]:
    """(name, the pair's part) of every slice that is large enough and not the whole suite."""
    if not policy.slices.share_of_alpha:
        return []
    return [
        (name, pair.part(places))
        for pair in pairs
        if pair.suite.kind != "drift"
        for name, places in pair.members.items()
        if policy.slices.min_items <= len(places) < len(pair.ids)
    ]


def _judge_slices(parts: Sequence[tuple[str, Pair]], policy: Policy, alpha: float) -> tuple[SliceResult, ...]:
    compared = [compare(part, policy.seed) for _, part in parts]
    results = []
    for (name, part), comparison, p in zip(parts, compared, holm([each.p_value for each in compared]), strict=True):
        least = max(policy.slices.min_drop, policy.min_drop_of(part.suite))
        verdict: Verdict = "fail" if p <= alpha and -comparison.difference >= least else "pass"
        results.append(SliceResult(part.suite.suite, name, part.suite.scale, part.against, comparison, p, verdict))
    return tuple(results)


def _poolable(suites: Sequence[SuiteResult], against: Against) -> list[SuiteResult]:
    return [each for each in suites if each.against == against and each.kind == "capability" and each.scale != "nats"]


def _pool(suites: Sequence[SuiteResult], against: Against, policy: Policy) -> PooledResult:
    results = [each.comparison for each in _poolable(suites, against)]
    mean, low, high = pooled_bounds([each.difference for each in results], [(each.low, each.high) for each in results])
    verdict: Verdict = "pass" if low > -policy.pooled_delta else "inconclusive"
    z = NormalDist().inv_cdf
    times = ((1 + z(policy.power) / z(CONFIDENCE)) * (mean - low) / policy.pooled_delta) ** 2
    needed = times if verdict == "inconclusive" and times > 1 and isfinite(times) else None
    return PooledResult(against, len(results), mean, low, high, policy.pooled_delta, verdict, needed)


def _judge_floors(pairs: Sequence[Pair], policy: Policy) -> tuple[FloorResult, ...]:
    results = []
    for pair in pairs:
        for floor in policy.floors:
            if floor.holds_for(pair.suite):
                score, n = float(pair.candidate.mean()), len(pair.ids)
                interval = share(round(score * n), n)
                verdict: Verdict = "fail" if score < floor.minimum else "pass"
                results.append(FloorResult(pair.suite.suite, floor.minimum, score, interval.low, interval.high, verdict))
    return tuple(results)


def _reasons(
    suites: Sequence[SuiteResult],
    slices: Sequence[SliceResult],
    pooled: Sequence[PooledResult],
    floors: Sequence[FloorResult],
    policy: Policy,
) -> list[str]:
    """Every reason in words, what weighs most first: those to fail, those that leave it open, warnings."""
    found = [
        ("fail", f"suite {floor.suite}: {floor.score:.1%} is below the floor of {floor.minimum:.1%}")
        for floor in floors
        if floor.verdict == "fail"
    ]
    for result in suites:
        text = f"suite {result.suite} against the {result.against}: {result.reason}"
        if result.verdict == "fail" and result.drivers:
            first = result.drivers[0]
            text += (
                f"; slice '{first.slice}', {first.share_of_items:.0%} of the items, carries {first.share_of_drop:.0%} of the drop"
            )
        if result.items_to_decide:
            text += f"; about {result.items_to_decide:,} items would decide"
        if result.verdict != "pass":
            found.append((result.verdict, text))
        elif result.kind == "drift" and -result.comparison.difference > policy.drift.warn:
            found.append(("warning", text))
    for part in slices:
        if part.verdict == "fail":
            seen = part.comparison
            text = f"{amount(seen.difference, part.scale)} ({seen.won} won, {seen.lost} lost of {seen.n})"
            text = f"slice '{part.slice}' of suite {part.suite} against the {part.against}: {text}"
            found.append(("fail", f"{text}, p = {part.p_corrected:.2g} after correction for {len(slices)} tests"))
    for pool in pooled:
        if pool.verdict != "pass":
            text = f"all {pool.suites} capability suites against the {pool.against}: {amount(pool.difference)} in the mean"
            text += f", lower bound {amount(pool.low)} where {amount(-pool.delta)} must be ruled out"
            text += f"; about {pool.times_items:.1f} times the items would decide" if pool.times_items else ""
            found.append((pool.verdict, text))
    metrics = {result.metric for result in suites}
    found += [
        ("note", f"no suite has {floor.about}, so its floor says nothing")
        for floor in policy.floors
        if floor.metric is not None and floor.metric not in metrics
    ]
    order = ("fail", "inconclusive", "warning", "note")
    return [f"{level}: {text}" for level, text in sorted(found, key=lambda each: order.index(each[0]))]


def amount(value: float, scale: str = "binary") -> str:
    """Return a difference in words: points of a share, or nats, where a rise is for the worse and has a plus sign."""
    return f"{-value:+.3f} nats" if scale == "nats" else f"{100 * value:+.1f} points"


def _flat(result: Any) -> dict[str, Any]:
    """A result's fields with those of its comparison among them."""
    plain = asdict(result)
    measured = plain.pop("comparison", {})
    return plain | measured


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
