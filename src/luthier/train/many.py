"""train_many(): several adapters over one base in one process, a step of each in turn.

The base is loaded once and lies in memory once. Each run has its own adapter in its layers, and its own rows, optimiser,
schedule, generator, folder and log. When its turn comes, its adapter is the active one and the generator is where this run left
it, so that it ends with the same bits as alone, and can be resumed alone too.

Not here: a run by itself (run.py), its step (loop.py).
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from rich.console import Console
from torch import Tensor

from luthier.adapt.switching import activate
from luthier.core.errors import CheckpointError, ConfigError, TrainingError
from luthier.core.methods import LOFTQ
from luthier.models.load import LoadedModel, load_model
from luthier.ops.compiler import use_compiler
from luthier.train.display import Display, make_bar, many_report, preflight_report
from luthier.train.launching import process_of
from luthier.train.loop import Trainer
from luthier.train.memory import peak_memory
from luthier.train.objectives import objective_class
from luthier.train.objectives.preferences import drops_parts
from luthier.train.preflight import Preflight, preflight
from luthier.train.prepare import FROZEN, Prepared, prepare
from luthier.train.records import Both
from luthier.train.run import Outcome, artifacts, finish, graceful_stop, tell_trackers
from luthier.train.runfolder import SUMMARY_FILE, RunFolder, random_state, restore_random_state
from luthier.train.settings import RunSettings
from luthier.train.tracking.base import check_trackers
from luthier.train.tracking.follow import Following

SHARED = ("model", "dtype", "quantize", "train.kernels", "train.gradient_checkpointing")
"""Settings of the base rather than of one adapter: the same in all runs that share it."""


@dataclass
class Turns:
    """The runs that take turns; `stop_requested` ends all of them after the step that is being made."""

    lanes: "list[_Lane]" = field(default_factory=list)
    stop_requested: bool = False


@dataclass
class _Lane:
    """One of the runs: its trainer, and the generators' states while another has its turn."""

    trainer: Trainer
    state: dict[str, Tensor]
    found: Preflight | None = None
    ended: str | None = None
    outcome: Outcome | None = None
    following: Following | None = None

    @contextmanager
    def at_work(self) -> Iterator[Trainer]:
        """Within the block everything that the runs share is as this one needs it."""
        trainer = self.trainer
        activate(trainer.model, trainer.prepared.adapter)
        use_compiler(trainer.is_compiled, next(trainer.model.parameters()).device)
        restore_random_state(self.state)
        try:
            yield trainer
        finally:
            self.state = random_state()


def train_many(settings: Sequence[RunSettings], *, console: Console | None = None) -> list[Outcome]:
    """Train an adapter as each of `settings` says, over one base, into the new folders `settings.out`; in their order.

    Each ends as `train` would end it, to the last bit. All must name the same base.
    Raises: ConfigError for settings that cannot share a base (all of them), and what `train` raises. Where a run fails, the
    others are in checkpoints, from which `resume_many` goes on.
    """
    console = console or Console(quiet=True)
    check_together(settings)
    for each in settings:
        check_trackers(each.train.track)
        RunFolder(each.out).check_free()
    tell = partial(console.log if console.is_terminal else console.print, markup=False)
    base = _load(settings[0], tell)
    _check_dropout(base, settings)
    prepared = [prepare_lane(each, base, name, tell) for each, name in zip(settings, lane_names(settings), strict=True)]
    turns = Turns()
    for ready, state in prepared:
        turns.lanes.append(_Lane(Trainer(ready, RunFolder.create(ready.settings)), state))
    return _carry_out(turns, console)


def resume_many(paths: Sequence[str | Path], *, console: Console | None = None) -> list[Outcome]:
    """Carry on with runs of one base from their last checkpoints, side by side; those that are finished are left as they are.

    Raises: CheckpointError if all are finished, or what `resume` raises; ConfigError as `train_many`.
    """
    console = console or Console(quiet=True)
    opened = [RunFolder.open(path) for path in paths]
    for folder, _ in opened:
        if _is_finished(folder):
            console.print(f"{folder.path} is finished; its adapter is {folder.adapter}", soft_wrap=True)
    left = [(folder, settings) for folder, settings in opened if not _is_finished(folder)]
    if not left:
        raise CheckpointError("all of these runs are finished; start new ones to train more")
    settings = [each for _, each in left]
    check_together(settings)
    for each in settings:
        check_trackers(each.train.track)
    tell = partial(console.print, markup=False)
    base = _load(settings[0], tell)
    _check_dropout(base, settings)
    turns = Turns()
    for (folder, each), name in zip(left, lane_names(settings), strict=True):
        found = folder.load_checkpoint()
        ready, state = prepare_lane(each, base, name, tell, adapter=found[2] if found else None)
        trainer = Trainer(ready, folder)
        if found is not None:
            trainer.restore(found[0], found[1])
            state = random_state()
        else:
            folder.cut_log(0)
        console.print(f"{folder.path} goes on from step {trainer.progress.step} of {trainer.num_steps}.", soft_wrap=True)
        turns.lanes.append(_Lane(trainer, state))
    return _carry_out(turns, console)


def prepare_lane(
    settings: RunSettings, base: LoadedModel, name: str, tell: partial[None], adapter: Path | None = None
) -> tuple[Prepared, dict[str, Tensor]]:
    """Prepare a run beside others on `base`; return it, and the generators' states that it begins with.

    Raises: ConfigError for an adapter that would change what the others compute with, and what `prepare` raises.
    """
    prepared = prepare(settings, tell=tell, adapter=adapter, base=base, name=name)
    plan = prepared.plan
    if settings.train.kernels == "fused" and (plan.saved or plan.biases or plan.tables):
        raise ConfigError(
            f"{settings.out}: its adapter replaces modules whole (modules_to_save, bias = 'all', trainable_token_indices), and "
            "then fewer blocks of the base could be fused, for the others too; train it by itself, or set train.kernels to "
            "'plain' in all"
        )
    return prepared, random_state()


def check_together(settings: Sequence[RunSettings]) -> None:
    """Raise ConfigError unless these runs can share one base; every reason why they cannot is listed."""
    if not settings:
        raise ConfigError("no runs were given")
    faults: list[str] = []
    if process_of(os.environ)[1] > 1:
        faults.append("this is one of several processes (torchrun, --nproc); adapters side by side are trained in one")
    for key in SHARED:
        values = {each.out: _value(each, key) for each in settings}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value!r} in {out}" for out, value in values.items())
            faults.append(f"{key} is of the base, so it must be the same: {listed}")
    faults += [
        f"{each.out}: init 'loftq' makes 4-bit weights of its own, which no other run could share"
        for each in settings
        if each.lora.init_lora_weights == LOFTQ
    ]
    faults += [f"{each.out}: train.full trains every weight of the base" for each in settings if each.train.full]
    faults += [
        f"{each.out}: objective {each.objective.kind} puts a head of its own into the base"
        for each in settings
        if objective_class(each.objective.kind).changes_base
    ]
    faults += [f"{each.out}: train.shard has no effect in one process" for each in settings if each.train.shard != "none"]
    outs = [str(Path(each.out).resolve()) for each in settings]
    faults += [f"{out} is named by {outs.count(out)} runs" for out in dict.fromkeys(outs) if outs.count(out) > 1]
    if faults:
        raise ConfigError("these runs cannot be trained over one base:\n" + "\n".join(f"  {fault}" for fault in faults), faults)


def _check_dropout(base: LoadedModel, settings: Sequence[RunSettings]) -> None:
    """Raise ConfigError where some of the runs would turn off the base's dropout under others that train with it."""
    silencing = {each.out: objective_class(each.objective.kind).silences_base for each in settings}
    if len(set(silencing.values())) > 1 and drops_parts(base.model):
        off, on = ([out for out, silences in silencing.items() if silences is which] for which in (True, False))
        raise ConfigError(
            f"this base drops parts of itself while it is trained, which the objectives of {', '.join(off)} turn off and "
            f"{', '.join(on)} would train with; train them by themselves"
        )


def lane_names(settings: Sequence[RunSettings]) -> list[str]:
    """Return a name for each run's adapter in the model, after its folder: letters, digits and dashes, each once."""
    names: list[str] = []
    for each in settings:
        name = "run-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(each.out).name).strip("-")[:80]
        taken = {*names, *(FROZEN.format(name=each) for each in names)}
        free = (name if number == 1 else f"{name}-{number}" for number in count(1))
        names.append(next(each for each in free if each not in taken and FROZEN.format(name=each) not in taken))
    return names


def _carry_out(turns: Turns, console: Console) -> list[Outcome]:
    lanes, bar = turns.lanes, make_bar(console)
    for lane in lanes:
        with lane.at_work() as trainer:
            lane.found = preflight(trainer)
            console.print(preflight_report(lane.found, str(trainer.prepared.plan), title=str(trainer.folder.path)))
            label = trainer.folder.path.name
            display = Display(console, trainer.num_steps, trainer.progress.step, label=label, bar=bar)
            lane.following = Following(trainer)
            trainer.observer = Both(display, lane.following)
    try:
        with graceful_stop(turns), ExitStack() as running:
            for lane in lanes:
                running.enter_context(lane.trainer.running())
            with bar:
                _take_turns(turns)
    except BaseException:
        for following in [lane.following for lane in lanes if lane.following is not None]:
            following.end("failed")  # of those that have not ended otherwise
            following.wait()
        raise
    for lane in lanes:
        if lane.following is not None and lane.outcome is not None:
            tell_trackers(lane.following, lane.outcome, console)
    outcomes = [lane.outcome for lane in lanes if lane.outcome is not None]
    console.print(many_report([outcome.summary for outcome in outcomes]))
    left = [str(lane.trainer.folder.path) for lane in lanes if lane.ended == "interrupted"]
    if left:
        words = " ".join(f"--resume {path}" for path in left)
        console.print(f"Stopped. Continue with: luthier train {words}", markup=False, soft_wrap=True)
    return outcomes


def _take_turns(turns: Turns) -> None:
    """Let each run make a step in turn until all have ended; one that ends is finished at once."""
    while going := [lane for lane in turns.lanes if lane.ended is None]:
        for lane in going:
            if turns.stop_requested:
                _save(turns.lanes)
                return
            _take_turn(lane, turns.lanes)


def _take_turn(lane: _Lane, lanes: Sequence[_Lane]) -> None:
    try:
        with lane.at_work() as trainer:
            if ended := trainer.advance():
                _finish(lane, ended)
    except TrainingError as error:
        lane.ended = "failed"
        _save(lanes)
        others = [f"--resume {each.trainer.folder.path}" for each in lanes if each.ended == "interrupted"]
        note = f"\nThe others are safe; go on with them by: luthier train {' '.join(others)}" if others else ""
        raise TrainingError(f"{lane.trainer.folder.path}: {error}{note}") from error


def _save(lanes: Sequence[_Lane]) -> None:
    """Write checkpoints of the runs that have not ended; between two of its steps, each is in a state that can be saved."""
    for lane in lanes:
        if lane.ended is None:
            with lane.at_work() as trainer:
                trainer.save()
                _finish(lane, "interrupted")


def _finish(lane: _Lane, ended: str) -> None:
    assert lane.found is not None and lane.following is not None  # every run was looked at before the first step
    lane.trainer.peak_bytes = peak_memory()
    lane.outcome = finish(lane.trainer, lane.found, ended)
    lane.ended = ended
    lane.following.end(ended, artifacts(lane.outcome.summary))


def _load(settings: RunSettings, tell: partial[None]) -> LoadedModel:
    return load_model(settings.model, dtype=settings.dtype, quantize=settings.quantize, progress=tell)


def _value(settings: RunSettings, key: str) -> object:
    section, _, name = key.rpartition(".")
    return getattr(getattr(settings, section) if section else settings, name)


def _is_finished(folder: RunFolder) -> bool:
    return (folder.path / SUMMARY_FILE).exists()
