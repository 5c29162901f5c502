"""Instruments: what a run needs before it starts, and what an adapter learned once it is there.

Never trains, never changes a model or an adapter's folder.
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "AdapterSpectra": "luthier.inspect.spectra",
        "LayerSimilarity": "luthier.inspect.similarity",
        "LayerSpectrum": "luthier.inspect.spectra",
        "Similarity": "luthier.inspect.similarity",
        "adapter_spectra": "luthier.inspect.spectra",
        "compare_adapters": "luthier.inspect.similarity",
        "draw": "luthier.inspect.pictures",
        "html_report": "luthier.inspect.report",
        "MemoryPlan": "luthier.inspect.memory_plan",
        "MergeSurvival": "luthier.inspect.survival",
        "Setting": "luthier.inspect.memory_plan",
        "StepShape": "luthier.inspect.step_trace",
        "merge_survival": "luthier.inspect.survival",
        "num_parameters": "luthier.inspect.counts",
        "Planner": "luthier.inspect.memory_plan",
        "rank_table": "luthier.inspect.counts",
        "trace_step": "luthier.inspect.step_trace",
    },
)
