"""The gate's verdicts on scores whose verdict can be worked out by hand or by scipy."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from tests.unit.evaluate.scored import ONLY_CAPABILITY, changed, suite

from luthier.core.errors import DataError
from luthier.evaluate import DEFAULT_POLICY, Policy, Subjects, decide

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 0.01, size=64)


def judged(*pairs, policy=ONLY_CAPABILITY, **named):
    """Decide over (base suite, candidate suite) pairs."""
    return decide([mine for _, mine in pairs], [base for base, _ in pairs], policy=policy, **named)


def pair_of(n, won, lost, name="facts", **named):
    base, candidate = changed(n, won, lost)
    return suite(base, name, **named), suite(candidate, name, **named)


def test_identical_scores_pass():
    report = judged(pair_of(400, 0, 0))
    assert (report.verdict, report.exit_code, report.reasons) == ("pass", 0, ())
    assert report.suites[0].comparison.difference == 0.0


def test_few_items_are_inconclusive_even_if_nothing_changed():
    report = judged(pair_of(40, 0, 0))
    assert (report.verdict, report.exit_code) == ("inconclusive", 3)
    (result,) = report.suites
    assert result.items_to_decide > 40
    enough = judged(pair_of(result.items_to_decide, 0, 0)).suites[0]
    assert (result.verdict, enough.verdict) == ("inconclusive", "pass")


def test_a_significant_drop_fails_and_says_why():
    report = judged(pair_of(500, 12, 38))
    assert (report.verdict, report.exit_code) == ("fail", 1)
    assert report.suites[0].comparison.p_value == pytest.approx(binomtest(12, 50, alternative="less").pvalue)
    assert report.reasons[0].startswith("fail: suite facts against the base: -5.2 points (12 won, 38 lost of 500)")


def test_the_same_drop_among_ten_suites_is_corrected_by_holm():
    report = judged(pair_of(500, 16, 34), *[pair_of(500, 25, 25, f"s{n}") for n in range(9)])
    p = binomtest(16, 50, alternative="less").pvalue
    assert p < 0.05 < 10 * p
    assert report.suites[0].p_corrected == pytest.approx(10 * p)
    assert report.verdict == "inconclusive"


def test_a_certain_drop_that_is_too_small_to_matter_is_no_fail():
    report = judged(pair_of(20_000, 10, 150))
    result = report.suites[0]
    assert result.p_corrected < 1e-9 and result.comparison.difference == pytest.approx(-0.007)
    assert report.verdict == "pass"


def test_improvement_is_asked_of_tasks_against_the_base_only():
    policy = Policy(name="t", kinds=("task",), floors=())
    same, better = pair_of(500, 10, 10, kind="task"), pair_of(500, 60, 10, kind="task")
    report = judged(same, policy=policy)
    assert report.verdict == "inconclusive" and "an improvement is asked for" in report.reasons[0]
    assert judged(better, policy=policy).verdict == "pass"
    assert judged(same, policy=policy.changed(task={"against_base": "no worse"})).verdict == "pass"
    base, candidate = better
    assert decide([candidate], [base], [candidate], policy).verdict == "pass"


def test_a_task_that_gained_too_little_to_be_sure_says_how_many_items_would_show_it():
    policy = Policy(name="t", kinds=("task",), floors=())
    result = judged(pair_of(200, 18, 12, kind="task"), policy=policy).suites[0]
    assert result.verdict == "inconclusive"
    n = result.items_to_decide
    draws = RNG.multinomial(n, [18 / 200, 12 / 200, 170 / 200], size=400)
    shown = np.mean(
        [judged(pair_of(n, *map(int, draw[:2]), kind="task"), policy=policy).verdict == "pass" for draw in draws[:60]]
    )
    assert shown > 0.6


def test_the_incumbent_is_a_baseline_of_its_own():
    base, candidate = pair_of(500, 10, 10)
    incumbent = suite([1] * 40 + [item.score for item in candidate.items[40:]])
    alone = decide([candidate], [base], policy=ONLY_CAPABILITY)
    both = decide([candidate], [base], [incumbent], ONLY_CAPABILITY, subjects=Subjects(incumbent="notes@3"))
    assert (alone.verdict, alone.baseline) == ("pass", "base")
    assert (both.verdict, both.baseline) == ("fail", "notes@3")
    assert [(each.against, each.verdict) for each in both.suites] == [("base", "pass"), ("incumbent", "fail")]
    ignoring = decide([candidate], [base], [incumbent], ONLY_CAPABILITY.changed(incumbent="ignored"))
    assert ignoring.verdict == "pass" and "note: the policy ignores the incumbent" in ignoring.reasons
    with pytest.raises(DataError, match="compares with the incumbent too"):
        decide([candidate], [base], policy=ONLY_CAPABILITY.changed(incumbent="required"))


def test_capability_suites_must_also_hold_together():
    """Five suites that each rule out five points, and together do not rule out two."""
    report = judged(*[pair_of(250, 11, 13, f"s{n}") for n in range(5)])
    assert {result.verdict for result in report.suites} == {"pass"}
    (pooled,) = report.pooled
    assert (pooled.verdict, pooled.suites, report.verdict) == ("inconclusive", 5, "inconclusive")
    assert pooled.difference == pytest.approx(-2 / 250)
    assert "all 5 capability suites against the base: -0.8 points" in report.reasons[-1]
    more = judged(*[pair_of(int(250 * pooled.times_items) + 1, 13, 13, f"s{n}") for n in range(5)])
    assert (pooled.times_items > 1, more.verdict) == (True, "pass")


@pytest.mark.parametrize(("rise", "verdict"), [(0.0, "pass"), (0.08, "pass"), (0.2, "fail"), (-0.4, "pass")])
def test_drift_is_judged_by_its_size(rise, verdict):
    policy = Policy(name="d", kinds=("drift",), floors=())
    base = 3 + NOISE
    report = judged((drift(base), drift(base + rise + NOISE[::-1])), policy=policy)
    assert report.verdict == verdict
    assert report.suites[0].p_corrected is None
    assert any(reason.startswith("warning: ") for reason in report.reasons) == (rise == 0.08)


def test_drift_that_few_documents_leave_open_is_inconclusive():
    policy = Policy(name="d", kinds=("drift",), floors=())
    wild = np.array([0.6, -0.5, 0.4, -0.3] * 6)
    report = judged((drift(np.full(24, 3.0)), drift(3.0 + wild)), policy=policy)
    assert report.verdict == "inconclusive" and "may be above 0.15" in report.reasons[0]
    few = judged((drift(np.full(6, 3.0)), drift(np.full(6, 3.0))), policy=policy)
    assert few.verdict == "inconclusive"


def test_nats_of_a_task_count_downwards():
    policy = Policy(name="t", kinds=("task",), floors=())
    loss = 2 + RNG.normal(0, 0.1, size=100)
    better = judged(tuple(suite(each, kind="task", scale="nats", metric="nll") for each in (loss, loss - 0.3)), policy=policy)
    worse = judged(tuple(suite(each, kind="task", scale="nats", metric="nll") for each in (loss, loss + 0.3)), policy=policy)
    assert (better.verdict, worse.verdict) == ("pass", "fail")
    assert "+0.300 nats" in worse.reasons[0]


def test_a_broken_floor_fails_whatever_the_baselines_do():
    policy = ONLY_CAPABILITY.changed(floors=({"metric": "json-valid", "minimum": 0.9}, {"suite": "facts", "minimum": 0.3}))
    same = pair_of(400, 0, 0, metric="json-valid")
    report = judged(same, policy=policy)
    assert report.verdict == "fail"
    assert "fail: suite facts: 50.0% is below the floor of 90.0%" in report.reasons
    assert [(floor.minimum, floor.verdict) for floor in report.floors] == [(0.9, "fail"), (0.3, "pass")]
    other = judged(pair_of(400, 0, 0), policy=policy)
    assert "note: no suite has metric 'json-valid', so its floor says nothing" in other.reasons


def test_slices_that_carry_a_drop_are_named():
    slices = [("negation",)] * 60 + [("plain", "short")] * 240 + [("plain",)] * 200
    base = [1] * 300 + [0] * 200
    candidate = [0] * 25 + [1] * 275 + [1] * 5 + [0] * 195
    report = judged((suite(base, slices=slices), suite(candidate, slices=slices)))
    (result,) = report.suites
    assert [(each.slice, each.lost, each.won) for each in result.drivers] == [("negation", 25, 0)]
    assert result.drivers[0].share_of_items == pytest.approx(0.12)
    assert result.drivers[0].share_of_drop == pytest.approx(25 / 20)
    assert result.lost_items == tuple(f"i{n}" for n in range(10))
    assert "slice 'negation', 12% of the items, carries 125% of the drop" in report.reasons[0]


def test_a_slice_fails_where_its_suite_hides_the_drop():
    slices = [("negation",)] * 60 + [("plain",)] * 940
    base = [1] * 500 + [0] * 500
    candidate = [0] * 20 + [1] * 480 + [1] * 20 + [0] * 480
    report = judged((suite(base, slices=slices), suite(candidate, slices=slices)))
    assert report.suites[0].verdict == "pass"
    assert [(part.slice, part.verdict) for part in report.slices] == [("negation", "fail"), ("plain", "pass")]
    assert report.verdict == "fail" and "slice 'negation' of suite facts" in report.reasons[0]
    small = judged(
        (suite(base, slices=slices), suite(candidate, slices=slices)), policy=ONLY_CAPABILITY.changed(slices={"min_items": 61})
    )
    assert [part.slice for part in small.slices] == ["plain"]
    none = judged(
        (suite(base, slices=slices), suite(candidate, slices=slices)),
        policy=ONLY_CAPABILITY.changed(slices={"share_of_alpha": 0}),
    )
    assert none.slices == () and none.verdict == "pass"


def test_copies_of_an_item_in_one_cluster_are_no_evidence():
    """Ten copies of each item, in one cluster, say what the item says alone."""
    base, candidate = changed(100, 3, 12)
    once = judged((suite(base), suite(candidate))).suites[0].comparison
    clusters = [f"c{n}" for n in range(100) for _ in range(10)]
    copies = judged(tuple(suite(np.repeat(each, 10), clusters=clusters) for each in (base, candidate))).suites[0].comparison
    assert (copies.clusters, copies.n, copies.test, once.test) == (100, 1000, "sign flips", "exact McNemar")
    assert copies.p_value == pytest.approx(once.p_value, abs=0.005)
    assert copies.low == pytest.approx(once.low, abs=0.01)


def test_suites_of_few_clusters_cannot_pass():
    clusters = [f"c{n % 8}" for n in range(800)]
    base, candidate = changed(800, 8, 8)
    report = judged((suite(base, clusters=clusters), suite(candidate, clusters=clusters)))
    assert report.verdict == "inconclusive" and "8 clusters where 20 are needed" in report.reasons[0]
    assert report.suites[0].items_to_decide >= 2000


def test_items_seen_in_training_are_left_out_of_all_sides():
    base, candidate = pair_of(500, 12, 38)
    report = judged((base, candidate), contaminated={"facts": [f"i{n}" for n in range(12, 50)], "other": ["i1"]})
    assert report.contaminated == {"facts": 38}
    assert (report.suites[0].comparison.n, report.suites[0].comparison.lost, report.verdict) == (462, 0, "pass")
    assert "note: 38 items of suite facts were in the training data and are left out" in report.reasons
    with pytest.raises(DataError, match="every item was found in the training data"):
        judged((base, candidate), contaminated={"facts": [item.id for item in base.items]})


def test_the_order_of_items_and_suites_does_not_matter():
    base, candidate = pair_of(300, 9, 20)
    other = pair_of(200, 3, 4, "other")
    turned = replace(candidate, items=candidate.items[::-1])
    report, again = judged((base, candidate), other), decide([other[1], turned], [base, other[0]], policy=ONLY_CAPABILITY)
    seen, seen_again = ({each.suite: each.comparison for each in one.suites} for one in (report, again))
    assert {name: (each.won, each.lost, each.p_value) for name, each in seen.items()} == {
        name: (each.won, each.lost, each.p_value) for name, each in seen_again.items()
    }
    assert report.verdict == again.verdict


def test_scores_that_cannot_be_paired_are_refused_with_all_faults():
    base = [suite([1, 0], "a"), suite([1, 0, 1], "b", digest="old"), suite([1, 0], "c"), suite([0.5, 1], "e")]
    candidate = [
        *(suite([1, 0], "a", metric="acc_norm"), suite([1, 0], "b"), suite([float("nan"), 1], "d", scale="graded")),
        *(suite([], "e"), suite([1, 0], "f", clusters=["x", "x"]), suite([1, 0], "f")),
    ]
    policy = DEFAULT_POLICY.changed(name="p", suites=("grammar",), floors=({"suite": "refusals", "minimum": 0.9},))
    with pytest.raises(DataError) as caught:
        decide(candidate, base, [suite([1, 0], "a", clusters=["x", "x"], metric="acc_norm")], policy)
    for words in (
        "suite 'a': its metric is 'acc_norm' for the candidate and 'acc' for the base",
        "suite 'a': 2 items are in other clusters for the incumbent, such as 'i0'",
        "suite 'b': its digest is 'd1' for the candidate and 'old' for the base",
        "suite 'b': 1 items only for the base",
        "suite 'c': the candidate has no scores",
        "suite 'd': the base has no scores",
        "suite 'd', the candidate: 1 scores are not graded, the first nan of item 'i0'",
        "suite 'e', the base: 1 scores are not binary, the first 0.5 of item 'i0'",
        "suite 'e', the candidate: there are no items",
        "suite 'f': the candidate has it 2 times",
        "asks for a suite of kind 'task'",
        "asks for the suite 'grammar'",
        "asks for a floor for suite 'refusals'",
    ):
        assert words in str(caught.value), str(caught.value)


def test_the_report_is_plain_json_with_the_keys_the_registry_keeps():
    subjects = Subjects("runs/a", "sha256:1", {"arch": "x"}, None)
    report = judged(pair_of(300, 9, 20, clusters=["one"] * 300), subjects=subjects)
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    expected = "format verdict exit_code policy baseline candidate base suites slices reasons decided_at"
    assert set(expected.split()) <= set(plain)
    assert plain["policy"] == {"name": "test", "version": 1, "digest": ONLY_CAPABILITY.digest()}
    assert plain["candidate"] == {"adapter": "runs/a", "manifest_digest": "sha256:1"}
    assert (plain["base"], plain["baseline"], plain["exit_code"]) == ({"fingerprint": {"arch": "x"}}, "base", 3)
    assert (plain["suites"][0]["n"], plain["suites"][0]["low"]) == (300, None)  # one cluster bounds nothing


def test_a_decision_can_be_repeated():
    clusters = [f"c{n // 4}" for n in range(400)]
    base, candidate = changed(400, 20, 40)
    pair = suite(base, clusters=clusters), suite(candidate, clusters=clusters)
    assert judged(pair).suites == judged(pair).suites
    assert judged(pair).suites != judged(pair, policy=ONLY_CAPABILITY.changed(seed=1)).suites


def drift(values):
    return suite(values, "neutral", kind="drift", scale="nats", metric="nll")
