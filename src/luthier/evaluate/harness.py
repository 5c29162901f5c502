"""lm-evaluation-harness on a model that is already loaded, adapters included; its per-item scores in our form, for the gate.

For its tasks there is no better program than itself; what is only wanted is that it takes this model, reads local files, asks no
network, and leaves out what costs time here (its index of 10,000 tasks, bootstrap, a report on the machine). Optional: everything
else in this room does without it.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, DataError, MissingExtraError
from luthier.evaluate.prompts import start_ids
from luthier.evaluate.scores import ItemScore, Kind, SuiteScores

if TYPE_CHECKING:
    from collections.abc import Iterator

GRADED = frozenset({"bleu", "chrf", "f1", "rouge1", "rouge2", "rougeL", "likelihood"})
PERCENT = frozenset({"bleu", "chrf"})


@dataclass(frozen=True)
class HarnessTask:
    """What lm-eval says of one task: its averages, and its items as it logs them (doc, arguments, responses, metrics)."""

    name: str
    digest: str
    results: dict[str, float]
    samples: tuple[dict[str, Any], ...]


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str | dict[str, Any]],
    *,
    include_path: Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    max_length: int | None = None,
    start_token: str = "auto",
) -> list[HarnessTask]:
    """Run lm-eval's tasks on the model as it is now, and return them in the order of their names.

    A task is a name in a YAML file below `include_path`, or its configuration as a dictionary. Data must be local
    (`dataset_path: json` with `data_files`). `start_token` goes before texts without a context, as in our suites; the default
    of lm-eval would be bos, which is another token in some models.
    Raises: MissingExtraError; ConfigError for tasks that lm-eval does not know.
    """
    with _quiet_and_offline():
        try:
            from lm_eval.evaluator import evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise MissingExtraError("lm-eval", "harness", "Running tasks of lm-evaluation-harness") from None
        from lm_eval import __version__

        manager = TaskManager(include_path=str(include_path) if include_path else None, include_defaults=False)
        try:
            loaded = manager.load(list(tasks))
        except (KeyError, ValueError) as fault:
            raise ConfigError(f"lm-eval cannot load these tasks: {fault}") from fault
        prefix = start_ids(tokenizer, start_token)[-1]
        lm = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            prefix_token_id=prefix,
            max_length=max_length,
        )
        found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None  # it is None on other ranks of a distributed run only
    made = []
    for name, samples in sorted(found["samples"].items()):
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        numbers = {key: value for key, value in found["results"][name].items() if isinstance(value, float)}
        said = {"lm-eval": __version__, "task": found["configs"][name], "docs": [each["doc_hash"] for each in ordered]}
        digest = hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
        made.append(HarnessTask(name, digest, numbers, tuple(ordered)))
    return made


def harness_scores(task: HarnessTask, metric: str, *, kind: Kind = "capability") -> SuiteScores:
    """Return one metric of a task item by item, as the gate takes it. Raises: DataError if items have no such number."""
    wrong = [sample["doc_id"] for sample in task.samples if not isinstance(sample.get(metric), int | float)]
    if wrong:
        known = sorted({key for sample in task.samples for key in sample.get("metrics", ())})
        raise DataError(
            f"{len(wrong)} of {len(task.samples)} items of {task.name!r} have no number under {metric!r}; "
            f"it has {', '.join(known)}"
        )
    scale = 100.0 if metric in PERCENT else 1.0
    items = tuple(ItemScore(str(each["doc_id"]), float(each[metric]) / scale, str(each["doc_id"])) for each in task.samples)
    return SuiteScores(task.name, task.digest, kind, metric, "graded" if metric in GRADED else "binary", items)


@contextmanager
def _quiet_and_offline() -> "Iterator[None]":
    """lm-eval and its libraries read these when they are imported, and warn of much that is no news."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        os.environ.setdefault(name, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
