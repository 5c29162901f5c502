"""Sweep: the search from its settings to a recommendation, in one folder that can be taken up again after a kill.

sweep.toml         the run's settings and the search's; `luthier sweep --resume` reads them
rows/              train.jsonl, held-out.jsonl, and test.jsonl, which no trial sees
study.db           proposals and what came of them (Optuna's, SQLite)
trials/trial-N/    a run each; trial.json is written last
default/           the run with the settings as they were given, for comparison
recommended.toml   what `luthier train -c` takes
sweep.json, sweep.png
"""

import json
import shutil
import time
import tomllib
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import tomli_w
from filelock import FileLock, Timeout

from luthier.core.atomic import write_atomic
from luthier.core.errors import CheckpointError, ConfigError, DivergedError, TrainingError
from luthier.train.display import duration
from luthier.train.rows import Rows, read_and_encode
from luthier.train.run import conclude, graceful_stop
from luthier.train.settings import RunSettings, without_none
from luthier.train.sweep.bench import Bench, carry_out
from luthier.train.sweep.paired import RowLosses, row_losses
from luthier.train.sweep.ranks import Standing, standing
from luthier.train.sweep.settings import ATTENTION, MLP, SweepSettings, check_run
from luthier.train.sweep.splits import on_files, split
from luthier.train.sweep.study import Proposal, Study, Trial, best_of, load_optuna

SWEEP_FILE, TRIAL_FILE, LOCK_FILE = "sweep.toml", "trial.json", ".lock"
Tell = Callable[[str], None]


class Sweep:
    """A search in its folder. `run()` goes on from wherever the folder is."""

    def __init__(self, folder: Path, run: RunSettings, settings: SweepSettings, tell: Tell | None = None):
        self.folder, self.settings = folder, settings
        self.given = run
        self.tell = tell or (lambda message: None)
        self.on_step: Callable[[int, int], None] = lambda done, total: None
        """Called with steps done and steps in all, where every trial goes to its end."""

    @classmethod
    def create(cls, run: RunSettings, settings: SweepSettings, tell: Tell | None = None) -> "Sweep":
        """Begin a search in `run.out`: check the settings, and tell the rows apart.

        Raises: ConfigError, DataError, CheckpointError where something is in the folder.
        """
        load_optuna()
        check_run(run, "luthier sweep")
        folder = Path(run.out)
        if (folder / SWEEP_FILE).exists():
            raise CheckpointError(f"{folder} holds a sweep; go on with --resume {folder}, or choose another --out")
        if folder.exists() and (not folder.is_dir() or any(entry.name != "rows" for entry in folder.iterdir())):
            raise CheckpointError(f"{folder} is not an empty folder; choose another --out")
        settings = settings.completed(run)
        shares = {"eval_fraction": settings.eval_fraction, "test": (settings.test_path, settings.test_fraction)}
        split(run.data, folder / "rows", **shares, seed=settings.seed)  # type: ignore[arg-type]
        values = {"run": run.model_dump(mode="json"), "sweep": settings.model_dump(mode="json")}
        write_atomic(folder / SWEEP_FILE, tomli_w.dumps(without_none(values)))
        return cls(folder, run, settings, tell)

    @classmethod
    def open(cls, folder: str | Path, tell: Tell | None = None) -> "Sweep":
        """Open the search in a folder. Raises: CheckpointError."""
        path = Path(folder) / SWEEP_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder} is no folder of a sweep: it has no {SWEEP_FILE}")
        values = tomllib.loads(path.read_text())
        run = RunSettings(**values["run"] | {"out": str(folder)})
        return cls(Path(folder), run, SweepSettings(**values["sweep"]), tell)

    def run(self) -> bool:
        """Try settings until the budget is used up; False where it was interrupted, and can be resumed.

        Raises: TrainingError where no trial came to its end, CheckpointError while another process works in the folder.
        """
        try:
            with FileLock(self.folder / LOCK_FILE, timeout=0):
                return self._run()
        except Timeout:
            raise CheckpointError(f"another process works on the sweep in {self.folder}; wait for it, or end it") from None

    def _run(self) -> bool:
        while True:
            left = self.study.open()
            if left is None:
                if self._is_used_up():
                    break
                self._begin_next()
                continue
            if not self._carry_out(*left):
                return False
        if self.best() is None:
            raise TrainingError(
                f"none of {len(self.trials())} trials came to its end; lower sweep.learning_rate "
                f"(now {self.settings.learning_rate}), or give more steps"
            )
        return True

    @cached_property
    def bench(self) -> Bench:
        return Bench(self.given, self.tell)

    @cached_property
    def rows(self) -> Rows:
        """The rows to train on and to compare by, read and encoded once."""
        return read_and_encode(self.base_run.data, self.bench.base.tokenizer, self.base_run.train.seed)

    @cached_property
    def base_run(self) -> RunSettings:
        """The run with the settings as given, over the rows of the search."""
        rows, steps = self.folder / "rows", self.settings.steps or self.given.train.max_steps
        loop = self.given.train.changed(max_steps=steps)
        return on_files(self.given, rows / "train.jsonl", rows / "held-out.jsonl", self.folder / "default", loop=loop)

    @cached_property
    def num_steps(self) -> int:
        """Steps of a trial."""
        return self.bench.num_steps(self.base_run, self.rows)

    @cached_property
    def study(self) -> Study:
        return Study(self.folder, self.settings, self.num_steps)

    @cached_property
    def targets(self) -> list[str | list[str]]:
        """The choices of target_modules, as this base has them."""
        return [self._target(choice) for choice in self.settings.targets or []]

    def trials(self) -> list[Trial]:
        """Return the trials that are finished."""
        return [trial for trial in self.study.trials() if trial.state in ("complete", "pruned")]

    def standing(self) -> Standing:
        return standing(self.trials(), self.settings, self.losses_of)

    def best(self) -> Trial | None:
        """Return the trial to recommend: the best of the rank that stayed, or so far of any."""
        trials, chosen = self.trials(), self.standing().chosen
        return best_of([trial for trial in trials if trial.proposal.r == chosen]) or best_of(trials)

    def losses_of(self, trial: Trial) -> RowLosses:
        """Return the held-out loss of each row, of the adapter that a finished trial kept."""
        return [(loss, count) for loss, count in self.record_of(trial)["row_losses"]]

    def record_of(self, trial: Trial) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.trial_folder(trial.proposal.number) / TRIAL_FILE).read_text())
        return record

    def trial_folder(self, number: int) -> Path:
        return self.folder / "trials" / f"trial-{number:03d}"

    def settings_of(self, proposal: Proposal) -> RunSettings:
        """Return the settings of a trial's run."""
        changes = self.changes_of(proposal)
        return self.base_run.changed(
            out=str(self.trial_folder(proposal.number)),
            lora=self.base_run.lora.changed(**changes["lora"]),
            train=self.base_run.train.changed(**changes["train"]),
        )

    def changes_of(self, proposal: Proposal) -> dict[str, dict[str, Any]]:
        """Return what a proposal changes in the settings, by section."""
        alpha = proposal.alpha_ratio * proposal.r
        target = self.targets[proposal.target]
        return {
            "lora": {"r": proposal.r, "lora_alpha": alpha, "target_modules": target},
            "train": {"learning_rate": float(f"{proposal.learning_rate:.4g}")},
        }

    def words_of(self, proposal: Proposal) -> str:
        """Return a proposal in a line."""
        choice = (self.settings.targets or [])[proposal.target]
        named = choice if isinstance(choice, str) else "+".join(choice)
        return f"r={proposal.r}, alpha {proposal.alpha_ratio:g}r, lr {proposal.learning_rate:.3g}, {named}"

    def _begin_next(self) -> None:
        now = self.standing()
        best = best_of(self.trials())
        if now.is_first and best is not None:
            # A new rank begins with what was best so far, so that the first comparison is of the rank alone.
            params = {name: getattr(best.proposal, name) for name in ("learning_rate", "alpha_ratio", "target")}
        else:
            params = self.study.propose()
        self.study.begin(now.r, params)

    def _is_used_up(self) -> bool:
        done = self.trials()
        spent = sum(self.record_of(trial)["seconds"] for trial in done)
        is_late = self.settings.minutes is not None and spent >= 60 * self.settings.minutes
        return len(done) >= self.settings.trials or (is_late and best_of(done) is not None)

    def _carry_out(self, proposal: Proposal, handle: Any) -> bool:
        """Run a trial to its end, and close it; False where it was interrupted."""
        path = self.trial_folder(proposal.number) / TRIAL_FILE
        if not path.exists():  # else a kill came between the two
            record = self.trained(self.settings_of(proposal), partial(self.study.prunes, handle), proposal.number)
            if record is None:
                return False
            write_atomic(path, json.dumps(record))
        record = json.loads(path.read_text())
        before = self.standing().raises
        self.study.close(handle, record["loss"])
        shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)
        self._tell_of(proposal, record)
        for found in self.standing().raises[len(before) :]:
            self.tell(str(found))
        return True

    def trained(self, settings: RunSettings, decide: Callable[[int, float], bool], number: int) -> dict[str, Any] | None:
        """Carry out a run, and return what came of it; None where it was interrupted."""
        began = time.monotonic()
        total = self.num_steps * self.settings.trials
        with self.bench.trainer(settings, self.rows) as trainer, graceful_stop(trainer):
            try:
                ended = carry_out(trainer, decide, lambda step: self.on_step(number * self.num_steps + step, total))
            except DivergedError as error:
                ended, reason = "diverged", str(error)
            if ended == "interrupted":
                return None
            record: dict[str, Any] = {"ended": ended, "steps": trainer.progress.step, "loss": None}
            if ended == "diverged":
                record["reason"] = reason
            elif ended != "pruned":
                conclude(trainer, ended)
                assert self.rows.held_out is not None
                losses = row_losses(self.bench.model, self.rows.held_out.rows, self.bench.pad_id)
                record |= {"loss": trainer.progress.best_loss, "best_step": trainer.progress.best_step, "row_losses": losses}
                record["parameters"] = sum(parameter.numel() for parameter in trainer.parameters)
        return record | {"seconds": time.monotonic() - began}

    def _tell_of(self, proposal: Proposal, record: dict[str, Any]) -> None:
        done, best = self.trials(), self.best()
        came = f"held out {record['loss']:.4f}" if record["loss"] is not None else f"{record['ended']} at step {record['steps']}"
        so_far = f"; best {best.loss:.4f} (trial {best.proposal.number})" if best and best.loss is not None else ""
        tried = f"trial {proposal.number} ({self.words_of(proposal)})"
        self.tell(f"{tried}: {came}{so_far}; {len(done)} of {self.settings.trials} trials{self._eta(done)}")

    def _eta(self, done: list[Trial]) -> str:
        spent = [self.record_of(trial)["seconds"] for trial in done]
        left = (self.settings.trials - len(done)) * sum(spent) / len(spent)
        if self.settings.minutes is not None:
            left = min(left, max(0.0, 60 * self.settings.minutes - sum(spent)))
        return f", about {duration(left)} left" if left else ""

    def _target(self, choice: str | list[str]) -> str | list[str]:
        if choice not in (ATTENTION, MLP):
            return choice
        found = self.bench.linear_layers(self.given, in_attention=choice == ATTENTION)
        if not found:
            raise ConfigError(f"sweep.targets names {choice!r}, and this base has no such linear layers; name modules instead")
        return found
