"""The search: its trials are plain runs over an untouched base, a planted optimum is found, ranks rise on evidence."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_run import save_tiny_model, write_rows

from luthier.core.errors import CheckpointError, ConfigError, TrainingError
from luthier.models.load import load_model
from luthier.train.run import train
from luthier.train.settings import RunSettings, read_settings
from luthier.train.sweep.paired import RowLosses, mean_loss, paired_gain
from luthier.train.sweep.ranks import standing
from luthier.train.sweep.recommend import recommend
from luthier.train.sweep.search import Sweep
from luthier.train.sweep.settings import SweepSettings
from luthier.train.sweep.study import Proposal, Study, Trial


@pytest.fixture(scope="module")
def lively_folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with weights large enough to learn something within a few steps."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    return save_tiny_model(folder, tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def run_in(lively_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunSettings]:
    """Return a factory of settings of runs in folders of this module, with a learning rate that is far too low."""
    home = tmp_path_factory.mktemp("sweeps")
    rows = write_rows(home / "rows.jsonl", 60)

    def make(name: str, **train: Any) -> RunSettings:
        return RunSettings(
            model=str(lively_folder),
            out=str(home / name),
            dtype="float32",
            data={"path": str(rows)},
            lora={"r": 4},
            train={"batch_rows": 8, "epochs": 3, "learning_rate": 1e-4, "compile": "off"} | train,
        )

    return make


@pytest.fixture(scope="module")
def searched(run_in: Callable[..., RunSettings]) -> tuple[Sweep, list[str]]:
    """Return a finished search over rates from far too low to far too high, and what it told."""
    torch.set_num_threads(2)
    told: list[str] = []
    settings = SweepSettings(trials=9, ranks=[2, 4], learning_rate=(1e-5, 1.0), alpha_ratios=[2.0], targets=["all-linear"])
    sweep = Sweep.create(run_in("searched"), settings, told.append)
    assert sweep.run()
    assert recommend(sweep) is not None
    return sweep, told


def test_the_base_is_what_it_was_bit_for_bit(searched: tuple[Sweep, list[str]], lively_folder: Path) -> None:
    model, fresh = searched[0].bench.model, load_model(str(lively_folder), dtype="float32").model
    own, other = dict(model.named_parameters()), dict(fresh.named_parameters())
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in other)
    assert [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]


def test_the_planted_rate_is_found(searched: tuple[Sweep, list[str]], tmp_path: Path) -> None:
    """The oracle trains plain runs, a rate each, on the same rows; the search knows nothing of it."""
    sweep, _ = searched
    best = sweep.best()
    assert best is not None and best.loss is not None
    losses = {}
    for rate in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        own = sweep.base_run.train.changed(learning_rate=rate)
        run = sweep.base_run.changed(
            out=str(tmp_path / str(rate)), train=own, lora=sweep.base_run.lora.changed(r=2, lora_alpha=4)
        )
        losses[rate] = train(run).summary["best_eval_loss"]
    planted = min(losses, key=losses.__getitem__)
    assert 1e-5 < planted < 1.0
    assert losses[1e-5] - losses[planted] > 0.1, "the task must have an optimum to be found"
    assert abs(math.log10(best.proposal.learning_rate / planted)) <= 1.0
    assert best.loss <= losses[planted] + 0.1 * (losses[1e-5] - losses[planted])


def test_a_trial_is_a_run_like_any_other(searched: tuple[Sweep, list[str]], tmp_path: Path) -> None:
    """Trained alone, in a fresh process's way of loading, its settings give the same adapter to the bit."""
    sweep, _ = searched
    number = next(trial.proposal.number for trial in sweep.trials()[2:] if trial.state == "complete")
    folder = sweep.trial_folder(number)
    settings = read_settings(folder / "config.toml").changed(out=str(tmp_path / "alone"))
    alone = train(settings)
    name = "adapter_model.safetensors"
    assert (alone.adapter / name).read_bytes() == (folder / "adapter" / name).read_bytes()
    assert alone.summary["best_eval_loss"] == sweep.record_of(sweep.trials()[number])["loss"]


def test_each_rank_gets_its_trials_and_the_comparison_is_told(searched: tuple[Sweep, list[str]]) -> None:
    sweep, told = searched
    ranks = [trial.proposal.r for trial in sweep.trials()]
    assert ranks[:8] == [2, 2, 2, 2, 4, 4, 4, 4]
    now = sweep.standing()
    assert now.chosen == ranks[8]
    (found,) = now.raises
    best = {
        r: min((t for t in sweep.trials()[:8] if t.proposal.r == r and t.state == "complete"), key=lambda t: t.loss)
        for r in (2, 4)
    }
    expected = paired_gain(sweep.losses_of(best[2]), sweep.losses_of(best[4]))
    assert found.gain == expected and found.is_raised == (expected.low > 0)
    assert str(found) in told
    before, first = sweep.trials()[:4], sweep.trials()[4]
    leader = min((trial for trial in before if trial.state == "complete"), key=lambda trial: trial.loss)
    assert first.proposal.learning_rate == leader.proposal.learning_rate
    assert first.state == "complete"


def test_row_losses_belong_to_the_adapter_that_was_kept(searched: tuple[Sweep, list[str]]) -> None:
    sweep, _ = searched
    for trial in sweep.trials():
        if trial.state == "complete":
            assert mean_loss(sweep.losses_of(trial)) == pytest.approx(trial.loss, rel=1e-5)


def test_no_trial_sees_a_test_row(searched: tuple[Sweep, list[str]], run_in: Callable[..., RunSettings]) -> None:
    sweep, _ = searched
    sides = {name: (sweep.folder / "rows" / f"{name}.jsonl").read_text().splitlines() for name in ("train", "held-out", "test")}
    given = Path(run_in("unused").data.path).read_text().splitlines()
    assert sorted(line for side in sides.values() for line in side) == sorted(
        json.dumps(json.loads(line), ensure_ascii=False) for line in given
    )
    assert [len(side) for side in sides.values()] == [43, 8, 9]
    for trial in sweep.trials():
        data = read_settings(sweep.trial_folder(trial.proposal.number) / "config.toml").data
        assert Path(data.path).name == "train.jsonl" and Path(data.eval_path or "").name == "held-out.jsonl"


def test_the_recommendation_can_be_trained_with_and_says_why(searched: tuple[Sweep, list[str]]) -> None:
    sweep, _ = searched
    result = json.loads((sweep.folder / "sweep.json").read_text())
    best = sweep.best()
    assert best is not None
    text = (sweep.folder / "recommended.toml").read_text()
    settings = read_settings(sweep.folder / "recommended.toml", {"out": "somewhere"})
    assert settings.data == sweep.given.data
    assert settings.lora.r == best.proposal.r == result["best"]["r"]
    assert settings.train.learning_rate == pytest.approx(best.proposal.learning_rate, rel=1e-3)
    assert settings.train.report and settings.train.epochs == sweep.given.train.epochs
    assert all(f"# {reason}" in text for reason in result["reasons"])
    # The rate as given hardly moves the model in so few steps, so the found one must be better on rows that nobody saw.
    assert result["test"]["against_default"]["verdict"] == "better" and result["test"]["against_base"]["verdict"] == "better"
    assert (
        result["test"]["losses"]["recommended"] < result["test"]["losses"]["default"] <= result["test"]["losses"]["base"] + 0.01
    )
    assert (sweep.folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert [row["trial"] for row in result["trials"]] == list(range(9))


def test_defaults_stay_where_the_test_rows_say_they_are_better(
    searched: tuple[Sweep, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search over rates that are all far too high or low finds nothing better than a good default, and says so."""
    sweep, _ = searched
    best = sweep.best()
    assert best is not None
    run = sweep.given.changed(
        out=str(tmp_path / "poor"), train=sweep.given.train.changed(learning_rate=float(f"{best.proposal.learning_rate:.3g}"))
    )
    settings = SweepSettings(trials=2, ranks=[2], learning_rate=(1e-7, 1e-6), alpha_ratios=[2.0], targets=["all-linear"])
    poor = Sweep.create(run, settings)
    assert poor.run()
    found = recommend(poor)
    assert found is not None
    assert found.against_default.verdict == "worse" and found.changes == {}
    assert any("WORSE" in reason for reason in found.reasons)
    kept = read_settings(poor.folder / "recommended.toml", {"out": "somewhere"})
    assert kept.lora == run.lora and kept.train == run.train


def test_rates_without_a_future_end_in_an_error_that_says_what_to_do(run_in: Callable[..., RunSettings]) -> None:
    settings = SweepSettings(trials=2, ranks=[2], learning_rate=(1e30, 1e35), targets=["all-linear"])
    sweep = Sweep.create(run_in("diverges"), settings)
    with pytest.raises(TrainingError, match=r"none of 2 trials.*lower sweep.learning_rate"):
        sweep.run()
    assert [sweep.record_of(trial)["ended"] for trial in sweep.trials()] == ["diverged", "diverged"]


# --- what the search follows from, without a model -----------------------------------------------------------


def planted(losses: dict[int, float]) -> Callable[[Trial], RowLosses]:
    """Return row losses of trials by rank: the mean of the rank, with a spread that all share and a small one of their own."""

    def of(trial: Trial) -> RowLosses:
        own = [0.01 * math.sin(17 * row + trial.proposal.r) for row in range(40)]
        return [(10 * (losses[trial.proposal.r] + 0.5 * math.cos(row) + own[row]), 10) for row in range(40)]

    return of


def trials_of(*ranks: int, state: str = "complete") -> list[Trial]:
    return [Trial(Proposal(number, r, 1e-3, 2.0, 0), state, 1.0) for number, r in enumerate(ranks)]


def test_ranks_rise_while_it_surely_pays_and_no_further() -> None:
    settings = SweepSettings(trials=9, ranks=[2, 4, 8])
    losses = planted({2: 1.0, 4: 0.9, 8: 0.899})
    assert standing([], settings, losses).r == 2
    assert standing(trials_of(2, 2, 2), settings, losses).r == 4
    assert standing(trials_of(2, 2, 2), settings, losses).is_first
    assert standing(trials_of(2, 2, 2, 4, 4, 4), settings, losses).r == 8
    now = standing(trials_of(2, 2, 2, 4, 4, 4, 8, 8, 8), settings, losses)
    assert now.chosen == 4 and [each.is_raised for each in now.raises] == [True, False]
    assert standing(trials_of(2, 2, 2, 4, 4, 4), settings.changed(min_gain=0.2), losses).chosen == 2


def test_later_trials_do_not_turn_a_comparison_around() -> None:
    settings = SweepSettings(trials=12, ranks=[2, 4, 8])
    trials = trials_of(2, 2, 2, 2, 4, 4, 4, 4)
    losses = planted({2: 1.0, 4: 0.999, 8: 0.5})
    before = standing(trials, settings, losses)
    later = [*trials, replace(trials[0], proposal=Proposal(8, 2, 1e-2, 2.0, 0), loss=0.1)]
    assert standing(later, settings, losses).raises == before.raises
    assert standing(later, settings, losses).r == 2


def test_a_rank_of_which_nothing_came_is_not_chosen() -> None:
    settings = SweepSettings(trials=4, ranks=[2, 4])
    gone = trials_of(2, 2) + [
        replace(t, proposal=replace(t.proposal, number=t.proposal.number + 2)) for t in trials_of(4, 4, state="pruned")
    ]
    now = standing(gone, settings, planted({2: 1.0, 4: 0.1}))
    assert now.chosen == 2 and now.raises[0].gain is None


def filled(folder: Path, settings: SweepSettings, count: int) -> Study:
    """Return a study of finished trials whose loss is lowest at a rate of 1e-3, made by its own proposals."""
    folder.mkdir()
    study = Study(folder, settings, num_steps=10)
    for _ in range(count):
        study.begin(4, study.propose())
        opened = study.open()
        assert opened is not None
        proposal, trial = opened
        study.prunes(trial, 5, 2.0)
        study.close(trial, 1.0 + math.log10(proposal.learning_rate / 1e-3) ** 2)
    return study


def test_proposals_follow_from_the_study_alone(tmp_path: Path) -> None:
    settings = SweepSettings(trials=14, ranks=[4], learning_rate=(1e-5, 1e-1), targets=["all-linear", ["q_proj"]])
    whole = filled(tmp_path / "whole", settings, 14)
    first = filled(tmp_path / "cut", settings, 9)
    del first
    again = Study(tmp_path / "cut", settings, num_steps=10)
    for _ in range(5):
        again.begin(4, again.propose())
        del again  # what a kill leaves: a proposal that was written down, and no trial
        again = Study(tmp_path / "cut", settings, num_steps=10)
        opened = again.open()
        assert opened is not None
        proposal, _ = opened
        del again, opened  # and one that had begun
        again = Study(tmp_path / "cut", settings, num_steps=10)
        opened = again.open()
        assert opened is not None and opened[0] == proposal
        again.close(opened[1], 1.0 + math.log10(proposal.learning_rate / 1e-3) ** 2)
    assert [trial.proposal for trial in again.trials()] == [trial.proposal for trial in whole.trials()]
    rates = [trial.proposal.learning_rate for trial in whole.trials()]
    assert abs(math.log10(min(whole.trials(), key=lambda t: t.loss).proposal.learning_rate / 1e-3)) < 0.5
    assert rates[0] == pytest.approx(1e-3)  # the middle
    other = filled(tmp_path / "other", settings.changed(seed=1), 14)
    assert [trial.proposal for trial in other.trials()] != [trial.proposal for trial in whole.trials()]


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_a_hopeless_trial_ends_early_and_a_promising_one_does_not(pruner: str, tmp_path: Path) -> None:
    settings = SweepSettings(trials=9, ranks=[4], learning_rate=(1e-5, 1e-1), targets=["all-linear"], pruner=pruner)
    study = Study(tmp_path, settings, num_steps=8)
    ended = []
    for offset in (0.0, 0.1, 0.05, 0.02, 5.0, -0.5):
        study.begin(4, study.propose())
        opened = study.open()
        assert opened is not None
        trial = opened[1]
        is_pruned = any(study.prunes(trial, step, 3.0 - 0.2 * step + offset) for step in range(1, 8))
        study.close(trial, None if is_pruned else 1.4 + offset)
        ended.append(is_pruned)
    assert ended[4] == (pruner != "none")
    assert not ended[0] and not ended[5]


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": [8, 4]}, "must rise"),
        ({"ranks": [4, 4]}, "names one twice"),
        ({"learning_rate": (1e-2, 1e-3)}, "lowest and a higher"),
        ({"trials": 1}, "trials"),
        ({"pruner": "mediam"}, "pruner"),
        ({"test_share": 0.1}, "unknown key 'test_share'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SweepSettings(**changes)


def test_runs_that_cannot_share_a_base_are_refused_before_anything_is_written(run_in: Callable[..., RunSettings]) -> None:
    run = run_in("refused")
    for changed, message in (
        (run.changed(lora={"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1}), "AdaLoRA"),
        (run.changed(quantize="nf4", lora={"r": 4, "init_lora_weights": "loftq"}), "loftq"),
        (run.changed(lora={"r": 4, "rank_pattern": {"q_proj": 2}}), "rank_pattern"),
        (run.changed(train=run.train.changed(full=True), lora={"r": 16}), "train.full"),
    ):
        with pytest.raises(ConfigError, match=message):
            Sweep.create(changed, SweepSettings())
    assert not Path(run.out).exists()


def test_targets_are_named_as_the_base_has_them(run_in: Callable[..., RunSettings]) -> None:
    sweep = Sweep.create(run_in("targets"), SweepSettings(targets=["attention", "mlp", "all-linear", ["q_proj", "up_proj"]]))
    assert sweep.targets == [
        ["k_proj", "o_proj", "q_proj", "v_proj"],
        ["down_proj", "gate_proj", "up_proj"],
        "all-linear",
        ["q_proj", "up_proj"],
    ]


def test_a_folder_in_use_is_refused(run_in: Callable[..., RunSettings], tmp_path: Path) -> None:
    sweep = Sweep.create(run_in("taken"), SweepSettings(trials=2, ranks=[2]))
    with pytest.raises(CheckpointError, match="--resume"):
        Sweep.create(run_in("taken"), SweepSettings(trials=2, ranks=[2]))
    opened = Sweep.open(sweep.folder)
    assert opened.settings == sweep.settings and opened.given == sweep.given
    with pytest.raises(CheckpointError, match="no folder of a sweep"):
        Sweep.open(tmp_path)
    shutil.rmtree(sweep.folder)


def test_too_few_rows_for_three_sides_are_refused(run_in: Callable[..., RunSettings], tmp_path: Path) -> None:
    run = run_in("few")
    few = run.changed(data=run.data.changed(path=str(write_rows(tmp_path / "few.jsonl", 8))))
    with pytest.raises(ConfigError, match="test: 1, held-out: 1"):
        Sweep.create(few, SweepSettings())
