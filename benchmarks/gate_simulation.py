"""Does the gate call unchanged models worse, and does it see a real drop?

Ten capability suites are drawn again and again: the base is right in 60 % of the items, and the candidate changes its answer in
a share of them (`--discordance`), to and fro alike (unchanged) or more often for the worse in one of the ten (`--drop`). Every
trial goes through the real `luthier.evaluate.decide`, beside two rules that are in use elsewhere: a fixed tolerance (reject if a
score is more than 2 points lower) and an unpaired z-test at 5 % in each suite. A rule rejects an adapter if it rejects any suite.

Also: the same suites cut into slices; items that come in clusters and change together, where McNemar's test on single items
stands beside the gate's; graded scores, singly and in clusters. `--only graded` runs those alone. The last line on stdout is one
JSON document. `--trials 4 --items 60` is the tiny run of the tests.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from math import sqrt
from typing import Any

import numpy as np

from luthier.evaluate import DEFAULT_POLICY, ItemScore, SuiteScores, decide
from luthier.evaluate.statistics import mcnemar_drop_p_value

ACCURACY = 0.60
TOLERANCE = 0.02
KINDS = ("single", "slices", "clusters", "graded", "graded-clusters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="of each setting; half as many of the slower ones")
    parser.add_argument("--items", type=int, nargs="*", default=[100, 500, 1000])
    parser.add_argument("--suites", type=int, default=10)
    parser.add_argument("--discordance", type=float, default=0.10)
    parser.add_argument("--drop", type=float, default=0.05)
    parser.add_argument("--cluster", type=int, default=5, help="items in a cluster that change together")
    parser.add_argument("--only", nargs="*", default=[*KINDS], choices=[*KINDS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help=argparse.SUPPRESS)  # the other benchmarks have it
    parser.add_argument("--data", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    found = {}
    for name, kind, items in settings(arguments.only, arguments.items, arguments.cluster):
        trials = arguments.trials if kind == "single" else arguments.trials // 2
        found[name] = {
            change: measure(arguments, trials, items, kind, drop)
            for change, drop in (("unchanged", 0.0), ("drop", arguments.drop))
        }
        for change, figures in found[name].items():
            print(f"{name}, {change}: " + ", ".join(map(shown, figures.items())), file=sys.stderr, flush=True)
    print(table(found))
    print(json.dumps({"settings": vars(arguments), "found": found}))


def settings(only: list[str], items: list[int], cluster: int) -> Iterator[tuple[str, str, int]]:
    """Yield (name, kind, items): single items at every size, the other kinds at the middle one."""
    middle = items[len(items) // 2]
    names = {
        "slices": f"in 5 slices, n = {middle}",
        "clusters": f"in clusters of {cluster}, n = {middle}",
        "graded": f"graded, n = {middle}",
        "graded-clusters": f"graded in clusters of {cluster}, n = {middle}",
    }
    for kind in only:
        if kind == "single":
            yield from ((f"single items, n = {n}", kind, n) for n in items)
        else:
            yield names[kind], kind, middle


def binary(rng: np.random.Generator, items: int, drop: float, *, discordance: float) -> tuple[Any, Any]:
    """Right or wrong; `discordance` of the items change, `drop` more of them for the worse than for the better."""
    base = rng.random(items) < ACCURACY
    lost, won = (discordance + drop) / 2 / ACCURACY, (discordance - drop) / 2 / (1 - ACCURACY)
    return base * 1.0, (base ^ (rng.random(items) < np.where(base, lost, won))) * 1.0


def graded(rng: np.random.Generator, items: int, drop: float, *, share: float) -> tuple[Any, Any]:
    """Quarters from 0 to 1 (a field F1, say); a share of the items is drawn anew, from a lower mean where there is a drop."""
    base = rng.binomial(4, ACCURACY, size=items) / 4
    anew = rng.binomial(4, ACCURACY - drop / share, size=items) / 4
    return base, np.where(rng.random(items) < share, anew, base)


def together(rng: np.random.Generator, pair: tuple[Any, Any], size: int) -> tuple[Any, Any]:
    """The items of a cluster are made alike, in both columns, with probability 1/2; else each stays for itself."""
    first = np.arange(len(pair[0])) // size * size
    alike = (rng.random(len(first)) < 0.5)[first]
    base, candidate = (np.where(alike, column[first], column) for column in pair)
    return base, candidate


def measure(arguments: argparse.Namespace, trials: int, items: int, kind: str, drop: float) -> dict[str, Any]:
    """Return the share of trials that each rule rejects, the verdicts of the gate, and standard errors."""
    cluster = arguments.cluster if "clusters" in kind else 1
    slices = 5 if kind == "slices" else 0
    draw = (
        partial(graded, share=2 * arguments.discordance)
        if "graded" in kind
        else partial(binary, discordance=arguments.discordance)
    )
    rng = np.random.default_rng([arguments.seed, items, cluster, slices])
    names = list(known_items(items, cluster, slices))
    counts: dict[str, int] = dict.fromkeys(("fail", "pass", "inconclusive", "found", "tolerance", "unpaired", "mcnemar"), 0)
    policy = DEFAULT_POLICY.changed(name="simulation", kinds=("capability",))
    alpha = policy.alpha / arguments.suites
    for _ in range(trials):
        base, candidate = [], []
        gates = dict.fromkeys(("tolerance", "unpaired", "mcnemar"), False)
        for index in range(arguments.suites):
            ours, theirs = draw(rng, items, drop if index == 0 else 0.0)
            if cluster > 1:
                ours, theirs = together(rng, (ours, theirs), cluster)
            base.append(scores(index, names, ours))
            candidate.append(scores(index, names, theirs))
            gates["tolerance"] |= ours.mean() - theirs.mean() > TOLERANCE
            gates["unpaired"] |= unpaired_z(ours, theirs) < -1.6449
            gates["mcnemar"] |= mcnemar_drop_p_value(int((theirs > ours).sum()), int((theirs < ours).sum())) <= alpha
        report = decide(candidate, base, policy=policy)
        counts[report.verdict] += 1
        damaged = {result.suite for result in (*report.suites, *report.slices) if result.verdict == "fail"}
        counts["found"] += "suite-0" in damaged
        for rule, is_rejected in gates.items():
            counts[rule] += bool(is_rejected)
    shares = {name: count / trials for name, count in counts.items()}
    return {"trials": trials} | shares | {"standard_errors": {name: sqrt(p * (1 - p) / trials) for name, p in shares.items()}}


def known_items(items: int, cluster: int, slices: int) -> Iterator[tuple[ItemScore, ...]]:
    """Yield the item with each score it may have, so that a million of them need not be made in every trial."""
    for number in range(items):
        of = (f"slice-{number * slices // items}",) if slices else ()
        yield tuple(ItemScore(str(number), quarter / 4, str(number // cluster), of) for quarter in range(5))


def scores(index: int, names: list[tuple[ItemScore, ...]], values: Any) -> SuiteScores:
    """Return a suite with these scores, which are quarters."""
    places = np.rint(values * 4).astype(int).tolist()
    is_binary = not np.any((values > 0) & (values < 1))
    items = tuple(known[place] for known, place in zip(names, places, strict=True))
    return SuiteScores(f"suite-{index}", "digest", "capability", "acc", "binary" if is_binary else "graded", items)


def unpaired_z(base: Any, candidate: Any) -> float:
    """The z of two independent samples, which these are not."""
    error = sqrt((base.var() + candidate.var()) / len(base))
    return float(candidate.mean() - base.mean()) / error if error else 0.0


def shown(figure: tuple[str, Any]) -> str:
    name, value = figure
    return f"{name} {value:.3f}" if isinstance(value, float) else ""


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the table for people: rejected of the unchanged, rejected of the damaged, for each rule; passes of the gate."""
    lines = [f"{'':32s}{'unchanged rejected':>36s}{'drop rejected':>36s}{'gate passes':>22s}"]
    head = "".join(f"{word:>12s}" for word in ("gate", "tolerance", "unpaired"))
    lines.append(f"{'':32s}{head}{head}{'unchanged':>12s}{'drop':>10s}")
    for name, figures in found.items():
        cells = "".join(
            f"{figures[change][rule]:12.3f}" for change in ("unchanged", "drop") for rule in ("fail", "tolerance", "unpaired")
        )
        lines.append(f"{name:32s}{cells}{figures['unchanged']['pass']:12.3f}{figures['drop']['pass']:10.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
