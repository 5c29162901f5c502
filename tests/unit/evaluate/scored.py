"""Suites of scores for the tests of the gate."""

from luthier.evaluate import ItemScore, Policy, SuiteScores

ONLY_CAPABILITY = Policy(name="test", kinds=("capability",), floors=())


def suite(scores, name="facts", *, clusters=None, slices=None, kind="capability", scale="binary", metric="acc", digest="d1"):
    """A suite of these scores; without `clusters` each item is its own."""
    items = tuple(
        ItemScore(f"i{n}", float(score), clusters[n] if clusters else f"i{n}", slices[n] if slices else ())
        for n, score in enumerate(scores)
    )
    return SuiteScores(name, digest, kind, metric, scale, items)


def changed(n, won, lost, right=0.5):
    """(base, candidate) binary scores of n items of which `won` and `lost` change."""
    kept = n - won - lost
    hits = round(kept * right)
    base = [0] * won + [1] * lost + [1] * hits + [0] * (kept - hits)
    return base, [1] * won + [0] * lost + base[won + lost :]
