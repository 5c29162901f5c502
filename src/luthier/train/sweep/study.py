"""The study: which settings are tried next, which trial ends early, and all of it in a file that survives a kill.

Optuna proposes and prunes. Its samplers draw from a generator that lives in the process, so after a kill they would go on with
other numbers. Here a proposal is a function of the finished trials and of the trial's own number: it is made by a fresh sampler
in memory, seeded by that number, and written down before the trial begins. So a search that was killed proposes what it would
have proposed.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import MissingExtraError
from luthier.train.sweep.settings import SweepSettings

if TYPE_CHECKING:
    import optuna

STUDY_FILE = "study.db"
FEWEST_TO_PRUNE = 3
"""Finished trials before the first is ended early: the median of fewer is chance."""
PLASTIC = 1.2207440846057596
"""The root of x^4 = x + 1: multiples of its powers fill three axes evenly (Roberts 2018, the R sequence)."""


@dataclass(frozen=True)
class Proposal:
    """What one trial tries. `target` is the place of its target_modules among the choices."""

    number: int
    r: int
    learning_rate: float
    alpha_ratio: float
    target: int


@dataclass(frozen=True)
class Trial:
    """A proposal and what came of it: `state` is waiting, running, complete or pruned; a run that diverged was pruned."""

    proposal: Proposal
    state: str
    loss: float | None
    """Its best held-out loss; of a pruned one the last."""


class Study:
    """The trials of a search, in `study.db` of its folder."""

    def __init__(self, folder: Path, settings: SweepSettings, num_steps: int):
        optuna = load_optuna()
        self.settings = settings
        low, high = settings.learning_rate or (0.0, 0.0)
        self.distributions = {
            "learning_rate": optuna.distributions.FloatDistribution(low, high, log=True),
            "alpha_ratio": optuna.distributions.CategoricalDistribution(settings.alpha_ratios),
            "target": optuna.distributions.CategoricalDistribution(range(len(settings.targets or ()))),
        }
        self.study = optuna.create_study(
            study_name="luthier",
            storage=optuna.storages.RDBStorage(f"sqlite:///{folder.absolute() / STUDY_FILE}"),
            pruner=_pruner(settings.pruner, num_steps),
            load_if_exists=True,
        )

    def trials(self) -> list[Trial]:
        """Return all trials in their order."""
        return [_trial_of(frozen) for frozen in self.study.get_trials(deepcopy=False)]

    def begin(self, r: int, params: dict[str, Any]) -> None:
        """Write down what the next trial tries, before anything else of it exists."""
        self.study.enqueue_trial(params, user_attrs={"r": r})

    def propose(self) -> dict[str, Any]:
        """Return the parameters of the next trial: at first such as fill the space evenly, then what TPE makes of the others.

        The first is the middle of the rates: what the user had.
        """
        optuna = load_optuna()
        finished = [each for each in self.study.get_trials() if each.state.is_finished()]
        number = len(finished)
        if number < max(FEWEST_TO_PRUNE, self.settings.trials_of_a_rank // 2):
            return self._evenly(number)
        sampler = optuna.samplers.TPESampler(seed=seed_of(self.settings.seed, number), n_startup_trials=0)
        memory = optuna.create_study(sampler=sampler)
        memory.add_trials(finished)
        return memory.ask(self.distributions).params

    def open(self) -> "tuple[Proposal, optuna.trial.Trial] | None":
        """Return the trial that a kill left unfinished, or the one that was written down and not begun; None: there is none."""
        optuna = load_optuna()
        states = optuna.trial.TrialState
        left = self.study.get_trials(deepcopy=False, states=(states.RUNNING,))
        if left:
            trial = optuna.trial.Trial(self.study, left[0]._trial_id)
        elif self.study.get_trials(deepcopy=False, states=(states.WAITING,)):
            trial = self.study.ask()
        else:
            return None
        # These are what was written down; whatever of it the study took over before a kill stays.
        rates, ratios, targets = self.distributions.values()
        trial.suggest_float("learning_rate", rates.low, rates.high, log=True)
        trial.suggest_categorical("alpha_ratio", ratios.choices)
        trial.suggest_categorical("target", targets.choices)
        return _proposal_of(self.study.get_trials(deepcopy=False)[trial.number]), trial

    def prunes(self, trial: "optuna.trial.Trial", step: int, loss: float) -> bool:
        """Take note of an evaluation, and return whether the trial should end with it.

        The first trial of a rank never does: it has the settings that were best so far, and the ranks are compared by it.
        """
        every = self.study.get_trials(deepcopy=False)
        known = every[trial.number].intermediate_values
        if step not in known:
            trial.report(loss, step)
        elif step < max(known):
            return False  # it went on from there before the kill
        is_first = all(each.user_attrs["r"] != trial.user_attrs["r"] for each in every[: trial.number])
        return not is_first and trial.should_prune()

    def close(self, trial: "optuna.trial.Trial", loss: float | None) -> None:
        """Finish a trial: with its best loss, or as pruned where there is none."""
        optuna = load_optuna()
        if loss is None:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, loss)

    def _evenly(self, number: int) -> dict[str, Any]:
        low, high = self.distributions["learning_rate"].low, self.distributions["learning_rate"].high
        dice = random.Random(f"luthier sweep, seed {self.settings.seed}")
        starts = [0.5, 0.0, 0.0] if number == 0 else [dice.random() for _ in range(3)]
        at = [(start + number / PLASTIC**power) % 1.0 for power, start in enumerate(starts, start=1)]
        ratios = self.settings.alpha_ratios
        rate = math.exp(math.log(low) + at[0] * (math.log(high) - math.log(low)))
        return {
            "learning_rate": min(max(rate, low), high),
            "alpha_ratio": _nearest(ratios, 2.0) if number == 0 else ratios[int(at[1] * len(ratios))],
            "target": int(at[2] * len(self.distributions["target"].choices)),
        }


def seed_of(seed: int, number: int) -> int:
    """Return the seed of the sampler that proposes trial `number`."""
    return int.from_bytes(hashlib.sha256(f"luthier sweep, seed {seed}, trial {number}".encode()).digest()[:4])


def load_optuna() -> Any:
    """Import Optuna, and have it say nothing by itself. Raises: MissingExtraError."""
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "sweep", "searching for settings") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the finished trial with the lowest loss; of equals the first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return min(complete, key=lambda trial: trial.loss if trial.loss is not None else math.inf, default=None)


def _pruner(name: str, num_steps: int) -> Any:
    optuna = load_optuna()
    if name == "median":
        # Which run is ahead in its first third says little of where it ends: a high rate is slow to pay.
        return optuna.pruners.MedianPruner(n_startup_trials=FEWEST_TO_PRUNE, n_warmup_steps=num_steps // 3)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, num_steps // 8), reduction_factor=2)
    return optuna.pruners.NopPruner()


def _proposal_of(frozen: Any) -> Proposal:
    params = frozen.params or frozen.system_attrs.get("fixed_params", {})
    return Proposal(frozen.number, frozen.user_attrs["r"], params["learning_rate"], params["alpha_ratio"], params["target"])


def _trial_of(frozen: Any) -> Trial:
    state = frozen.state.name.lower()
    last = frozen.intermediate_values[max(frozen.intermediate_values)] if frozen.intermediate_values else None
    return Trial(_proposal_of(frozen), state, frozen.value if state == "complete" else last)


def _nearest(values: Sequence[float], wanted: float) -> float:
    return min(values, key=lambda value: abs(math.log(value / wanted)))
