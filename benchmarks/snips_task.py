"""The task that the benchmarks of preferences and rewards begin with: SNIPS as chat, and an adapter that has learned a little."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.train.run import Outcome

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SYSTEM = "Reply with JSON: intent, slots."
ANSWER = '{{ {"intent": intent, "slots": slots} | tojson }}'


def weak_adapter(arguments: argparse.Namespace, out: Path, dtype: str = "auto") -> "Outcome":
    """Train `--sft-steps` steps of 8 rows into `out`/weak."""
    from luthier.train import RunSettings, train

    rows = {"path": str(arguments.data / "snips_json_train.jsonl"), "prompt": "{{ text }}", "completion": ANSWER}
    settings = RunSettings(
        model=arguments.model,
        out=str(out / "weak"),
        dtype=dtype,
        data=rows | {"system": SYSTEM, "eval_fraction": 0},
        train={"max_steps": arguments.sft_steps, "batch_rows": 8, "learning_rate": 5e-4},
    )
    return train(settings, console=console())


def console() -> Any:
    """Return where progress is shown: stderr, since the last line of stdout is the result."""
    from rich.console import Console

    from luthier.cli.output import quiet_transformers

    quiet_transformers()
    return Console(stderr=True, width=120)
