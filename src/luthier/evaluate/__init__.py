"""Judging adapters: metrics, statistics, and the same held-out rows put to the base and to the adapter.

Never trains, never writes files.
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Contestant": "luthier.evaluate.scores",
        "DEFAULT_POLICY": "luthier.evaluate.policy",
        "GateReport": "luthier.evaluate.gate",
        "ItemScore": "luthier.evaluate.scores",
        "Judgement": "luthier.evaluate.judgement",
        "JsonScores": "luthier.evaluate.metrics",
        "PairScores": "luthier.evaluate.metrics",
        "Policy": "luthier.evaluate.policy",
        "Sample": "luthier.evaluate.judgement",
        "Share": "luthier.evaluate.statistics",
        "Side": "luthier.evaluate.judgement",
        "Subjects": "luthier.evaluate.gate",
        "SuiteScores": "luthier.evaluate.scores",
        "decide": "luthier.evaluate.gate",
        "exact_match": "luthier.evaluate.metrics",
        "is_json_container": "luthier.evaluate.metrics",
        "json_scores": "luthier.evaluate.metrics",
        "judge": "luthier.evaluate.judgement",
        "judgement_report": "luthier.evaluate.report",
        "judgement_table": "luthier.evaluate.report",
        "mcnemar_p_value": "luthier.evaluate.statistics",
        "read_policy": "luthier.evaluate.policy",
        "read_scores": "luthier.evaluate.scores",
        "sample_panel": "luthier.evaluate.report",
        "share": "luthier.evaluate.statistics",
        "write_scores": "luthier.evaluate.scores",
    },
)
