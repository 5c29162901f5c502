"""A run in Weights & Biases: in files that `wandb sync` sends later, unless WANDB_MODE says otherwise."""

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.train.tracking.base import PROJECT, Record, RunFacts, Status

EXIT_CODE = {"finished": 0, "failed": 1, "interrupted": 130}


class Wandb:
    """History by step, settings as config, files as artefacts. Nothing is told of the machine, the code or its packages."""

    def __init__(self) -> None:
        import wandb

        self.wandb: Any = wandb
        self.run: Any = None

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        """Open a run in the project of the settings, WANDB_PROJECT or "luthier"; files go to WANDB_DIR or the run's folder."""
        quiet: dict[str, Any] = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "stop_fn": lambda: None,  # a button on a page is no signal to this process
        }
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        run_id = run_id or uuid.uuid4().hex[:12]
        self.run = self.wandb.init(
            project=facts.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            dir=os.environ.get("WANDB_DIR") or facts.folder,
            name=facts.name,
            id=run_id,
            resume="allow" if mode == "online" else None,  # offline there is nobody to ask; the id alone makes it one run
            config={**facts.parameters, **facts.facts},
            mode=mode,
            settings=self.wandb.Settings(**quiet),
        )
        return run_id

    def log(self, records: Sequence[Record]) -> None:
        """Add to the history; an evaluation joins the line of its step."""
        for record in records:
            self.run.log(dict(record.figures), step=record.step)

    def artifact(self, path: Path) -> None:
        """Log a folder as a model, a file as a file. Neither is copied: both stay where they are."""
        name = re.sub(r"[^\w.-]", "-", f"{path.stem}-{self.run.id}")
        kept = self.wandb.Artifact(name, type="model" if path.is_dir() else "file")
        if path.is_dir():
            kept.add_dir(str(path), policy="immutable")
        else:
            kept.add_file(str(path), policy="immutable")
        self.run.log_artifact(kept)

    def finish(self, status: Status) -> None:
        """Close the run: what is not an end in order has an exit code, and the word for it stands in the summary."""
        self.run.summary["status"] = status
        self.run.finish(exit_code=EXIT_CODE[status])
