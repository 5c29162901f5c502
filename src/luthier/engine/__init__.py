"""Running models: many requests for many adapters in one batch, scoring answers, generating text.

Used by `train`, `evaluate` and `serve`; knows nothing of them, of tasks, or of files on disk.
"""

from luthier.core.lazy import lazy_names

# No module here bears the name of what it holds: importing it would put the module in the place of the name.
__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Completion": "luthier.engine.requests",
        "Constraint": "luthier.engine.requests",
        "Engine": "luthier.engine.serving",
        "Event": "luthier.engine.jobs",
        "Generation": "luthier.engine.generation",
        "Handle": "luthier.engine.jobs",
        "Limits": "luthier.engine.scheduler",
        "LossReport": "luthier.engine.score",
        "RewardModel": "luthier.engine.reward_model",
        "Sampling": "luthier.engine.requests",
        "answer_log_probs": "luthier.engine.score",
        "answer_loss": "luthier.engine.score",
        "answer_loss_plain": "luthier.engine.score",
        "generate": "luthier.engine.generation",
        "held_out_loss": "luthier.engine.score",
        "log_likelihoods": "luthier.engine.likelihood",
        "rolling_windows": "luthier.engine.likelihood",
        "row_sums": "luthier.engine.score",
        "stream": "luthier.engine.generation",
    },
)
