"""Supervised fine-tuning in a loop of our own: plan, step, evaluate, checkpoint, resume.

This room never decides which data or model to use (the settings do) and never judges an adapter (`luthier.evaluate` does).
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "RunSettings": "luthier.train.settings",
        "Trainer": "luthier.train.loop",
        "read_settings": "luthier.train.settings",
        "dry_run": "luthier.train.run",
        "resume": "luthier.train.run",
        "resume_many": "luthier.train.many",
        "train": "luthier.train.run",
        "train_many": "luthier.train.many",
    },
)
