"""Search before training: many short runs over one base in memory, compared row by row, and what they recommend.

Not here: how a run is trained (loop.py); whether an adapter may go out (`luthier gate`).
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "CurveSettings": "luthier.train.sweep.settings",
        "Sweep": "luthier.train.sweep.search",
        "SweepSettings": "luthier.train.sweep.settings",
        "fit_power_law": "luthier.train.sweep.power_law",
        "learning_curve": "luthier.train.sweep.curve",
    },
)
