"""Running models: scoring answers and generating text.

Used by `train`, `evaluate` and `serve`; knows nothing of them, of tasks, or of files on disk.
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Generation": "luthier.engine.generation",
        "LossReport": "luthier.engine.score",
        "answer_loss": "luthier.engine.score",
        "answer_loss_plain": "luthier.engine.score",
        "generate": "luthier.engine.generation",
        "held_out_loss": "luthier.engine.score",
        "log_likelihoods": "luthier.engine.likelihood",
        "rolling_windows": "luthier.engine.likelihood",
        "stream": "luthier.engine.generation",
    },
)
