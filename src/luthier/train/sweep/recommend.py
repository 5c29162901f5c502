"""What a search recommends, checked on rows that no trial saw: against the settings as they were given, and against the base.

The best of many trials owes part of its held-out loss to chance, since it was chosen by it. The test rows were set aside before
anything was trained, so what they say is not about the choice.
"""

import json
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import tomli_w

from luthier.adapt.attaching import detach
from luthier.core.atomic import write_atomic
from luthier.core.errors import MissingExtraError
from luthier.formats.adapters import load_adapter
from luthier.train.rows import encode_file
from luthier.train.settings import merged, without_none
from luthier.train.sweep.paired import Gain, RowLosses, mean_loss, paired_gain, row_losses
from luthier.train.sweep.plot import plot_search
from luthier.train.sweep.search import Sweep
from luthier.train.sweep.study import Trial

RECOMMENDED_FILE, RESULT_FILE, PLOT_FILE = "recommended.toml", "sweep.json", "sweep.png"
DEFAULT_RECORD = "default.json"


@dataclass(frozen=True)
class Recommendation:
    """The settings to train with, and why. `found` is the trial; `changes` are empty where the given settings are to stay."""

    found: Trial
    changes: dict[str, dict[str, Any]]
    against_default: Gain
    against_base: Gain
    test_losses: dict[str, float]
    reasons: tuple[str, ...]


def recommend(sweep: Sweep) -> Recommendation | None:
    """Judge the best trial of a finished search on the test rows, and write what it recommends into the folder.

    The settings as given are trained first, over the same rows and steps. None where that was interrupted.
    """
    record = _default_record(sweep)
    if record is None:
        return None
    best = sweep.best()
    assert best is not None
    tests = _test_losses(sweep, best, record["loss"] is not None)
    against_base = paired_gain(tests["base"], tests["recommended"])
    against_default = paired_gain(tests.get("default", tests["base"]), tests["recommended"])
    changes = sweep.changes_of(best.proposal) if against_default.high >= 0 else {}
    means = {name: mean_loss(losses) for name, losses in tests.items()}
    reasons = _reasons(sweep, best, against_default, against_base, means)
    found = Recommendation(best, changes, against_default, against_base, means, tuple(reasons))
    _write(sweep, found, record)
    return found


def _default_record(sweep: Sweep) -> dict[str, Any] | None:
    """Train the settings as given, unless that was done; return what came of it."""
    path = sweep.folder / DEFAULT_RECORD
    if not path.exists():
        sweep.tell("training with the settings as they were given, to compare with")
        record = sweep.trained(sweep.base_run, lambda step, loss: False, sweep.settings.trials)
        if record is None:
            return None
        write_atomic(path, json.dumps(record))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _test_losses(sweep: Sweep, best: Trial, has_default: bool) -> dict[str, RowLosses]:
    """Return the losses of the test rows: of the base, of the best trial's adapter, and of the given settings'."""
    model, pad_id = sweep.bench.model, sweep.bench.pad_id
    rows = encode_file(sweep.folder / "rows" / "test.jsonl", sweep.base_run.data, sweep.bench.base.tokenizer).rows
    scored = partial(row_losses, model, rows, pad_id)
    found = {"base": scored()}
    adapters = {"recommended": sweep.trial_folder(best.proposal.number) / "adapter"}
    if has_default:
        adapters["default"] = sweep.folder / "default" / "adapter"
    for name, folder in adapters.items():
        load_adapter(model, folder, "default")
        try:
            found[name] = scored()
        finally:
            detach(model)
    return found


def _reasons(sweep: Sweep, best: Trial, default: Gain, base: Gain, means: dict[str, float]) -> list[str]:
    """Say in words why these settings, and what was not shown."""
    trials, given = sweep.trials(), sweep.given
    ended = sum(trial.state == "pruned" for trial in trials)
    said = [
        f"Trial {best.proposal.number} ({sweep.words_of(best.proposal)}) had the lowest held-out loss, {best.loss:.4f}, of "
        f"{len(trials)} trials of {sweep.num_steps} steps; {ended} were ended early."
    ]
    said += [f"{raised}." for raised in sweep.standing().raises]
    if sweep.standing().chosen is None:
        said.append("The budget ended before it was known whether a higher rank helps.")
    named = f"r={given.lora.r}, alpha {given.lora.lora_alpha:g}, lr {given.train.learning_rate:g}"
    if "default" not in means:
        said.append(f"The settings as given ({named}) diverged.")
    else:
        verdict = {
            "better": "which is better beyond chance",
            "worse": "which is WORSE beyond chance, so the settings as given are recommended",
            "not told apart": "which is not told apart from chance: they may do as well",
        }[default.verdict]
        said.append(
            f"On {default.rows} rows no trial saw, the loss is {means['recommended']:.4f}; with the settings as given ({named}) "
            f"{means['default']:.4f}: {default} nats per token saved, {verdict}."
        )
    said.append(f"The base's is {means['base']:.4f}: {base} saved, {base.verdict}.")
    rates = sweep.settings.learning_rate
    if rates and not rates[0] * 1.5 < best.proposal.learning_rate < rates[1] / 1.5:
        searched = f"{rates[0]:.3g} to {rates[1]:.3g}"
        said.append(f"The rate lies at the edge of what was searched ({searched}): a wider search may do better.")
    if sweep.settings.steps is not None:
        said.append(f"It was found in runs of {sweep.num_steps} steps; a much longer run may want a lower rate.")
    return said


def _write(sweep: Sweep, found: Recommendation, default: dict[str, Any]) -> None:
    values = merged(sweep.given.model_dump(mode="json", exclude={"out"}), found.changes)
    words = "".join(f"# {reason}\n" for reason in found.reasons)
    write_atomic(sweep.folder / RECOMMENDED_FILE, words + "\n" + tomli_w.dumps(without_none(values)))
    try:
        plot_search(sweep, sweep.folder / PLOT_FILE)
    except MissingExtraError as error:
        sweep.tell(str(error))
    write_atomic(sweep.folder / RESULT_FILE, json.dumps(result_of(sweep, found, default), indent=2))


def result_of(sweep: Sweep, found: Recommendation, default: dict[str, Any]) -> dict[str, Any]:
    """Return everything that was found, as plain values."""
    plot = sweep.folder / PLOT_FILE
    now = sweep.standing()
    return {
        "sweep": str(sweep.folder),
        "best": row_of(sweep, found.found),
        "recommended": str(sweep.folder / RECOMMENDED_FILE),
        "changes": found.changes,
        "reasons": list(found.reasons),
        "test": {
            "losses": found.test_losses,
            "against_default": found.against_default.as_dict(),
            "against_base": found.against_base.as_dict(),
        },
        "default": {key: value for key, value in default.items() if key != "row_losses"},
        "rank": {"chosen": now.chosen, "raises": [each.as_dict() for each in now.raises]},
        "trials": [row_of(sweep, trial) for trial in sweep.trials()],
        "steps": sweep.num_steps,
        "plot": str(plot) if plot.exists() else None,
        "next": [f"luthier train -c {sweep.folder / RECOMMENDED_FILE}"],
    }


def row_of(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    """Return one trial as a row of a table."""
    record = {key: value for key, value in sweep.record_of(trial).items() if key != "row_losses"}
    proposal = trial.proposal
    return {
        "trial": proposal.number,
        "r": proposal.r,
        "lora_alpha": proposal.alpha_ratio * proposal.r,
        "learning_rate": proposal.learning_rate,
        "target_modules": (sweep.settings.targets or [])[proposal.target],
        "last_loss": trial.loss if trial.loss is not None and math.isfinite(trial.loss) else None,
    } | record
