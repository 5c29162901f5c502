"""Judging adapters: metrics, statistics, and the same held-out rows or suites put to the base and to the adapter.

Never trains; the only files it writes are scores (`scores`, and `base_cache` for what a base scored before).
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Contamination": "luthier.evaluate.contamination",
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
        "Suite": "luthier.evaluate.suites",
        "SuiteRun": "luthier.evaluate.runner",
        "SuiteScores": "luthier.evaluate.scores",
        "decide": "luthier.evaluate.gate",
        "exact_match": "luthier.evaluate.metrics",
        "find_contamination": "luthier.evaluate.contamination",
        "find_suites": "luthier.evaluate.shipped",
        "is_json_container": "luthier.evaluate.metrics",
        "json_scores": "luthier.evaluate.metrics",
        "load_suite": "luthier.evaluate.suites",
        "judge": "luthier.evaluate.judgement",
        "judgement_report": "luthier.evaluate.report",
        "judgement_table": "luthier.evaluate.report",
        "find_suite": "luthier.evaluate.public",
        "run_harness": "luthier.evaluate.harness",
        "run_suite": "luthier.evaluate.runner",
        "run_suites": "luthier.evaluate.runner",
        "suites_table": "luthier.evaluate.suite_report",
        "mcnemar_p_value": "luthier.evaluate.statistics",
        "read_policy": "luthier.evaluate.policy",
        "read_scores": "luthier.evaluate.scores",
        "sample_panel": "luthier.evaluate.report",
        "share": "luthier.evaluate.statistics",
        "write_scores": "luthier.evaluate.scores",
    },
)
