"""What the tests of training and of the command line share: a tiny model on disk, a few rows, and the command as a process.

Nothing here imitates luthier: the model is a real transformers model, and the command is run as a user runs it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORDS = ("refret", "plane", "glue", "string", "tune", "carve", "bend", "sand", "oil", "polish", "brace", "bridge", "nut")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}


def save_tiny_model(folder: Path, make: Callable[..., Any], tokenizer: Any, **settings: Any) -> Path:
    """Save a model made by one of the `tiny_...` fixtures, and its tokenizer, as a folder that luthier can be pointed to."""
    make(vocab=len(tokenizer), **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Return rows of odd and unlike lengths; the answer follows from the question, so that a model can learn it."""
    found = []
    for index in range(start, start + count):
        asked = [WORDS[(index * 7 + turn) % len(WORDS)] for turn in range(1 + index % 5)]
        found.append(
            {
                "messages": [
                    {"role": "system", "content": "Say."},
                    {"role": "user", "content": " ".join(asked)},
                    {"role": "assistant", "content": asked[0].upper() * (1 + index % 2)},
                ]
            }
        )
    return found


def write_rows(path: Path, count: int, *, start: int = 0) -> Path:
    """Write `count` rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, start=start)))
    return path


def train_tiny(home: Path, model: Path, name: str = "orders-1") -> Path:
    """Train three steps on seven rows in `home`, with held-out rows of their own; returns the finished run's folder."""
    from luthier.train.run import train
    from luthier.train.settings import RunSettings

    settings = {
        "model": str(model),
        "out": str(home / name),
        "dtype": "float32",
        "data": {"path": str(write_rows(home / "rows.jsonl", 7)), "eval_path": str(write_rows(home / "held.jsonl", 3, start=9))},
        "lora": {"r": 3},
        "train": {"max_steps": 3, "batch_rows": 3, "compile": "off"},
    }
    train(RunSettings(**settings))
    return home / name


def count_language_models() -> int:
    """Return how many causal language models of transformers' are alive in this process."""
    import gc

    from transformers import PreTrainedModel

    gc.collect()
    # By type(): isinstance would ask proxies, some of which complain.
    models = [each for each in gc.get_objects() if issubclass(type(each), PreTrainedModel)]
    return sum("lm_head" in each._modules for each in models)


def command(*words: object) -> list[str]:
    """Return the words of a `luthier` command line."""
    return [sys.executable, "-m", "luthier.cli.app", *map(str, words)]


def run_luthier(*words: object, cwd: Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run `luthier` as a process of its own and return what it said and its exit status."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command(*words), cwd=cwd, capture_output=True, text=True, env=environment, timeout=600)
