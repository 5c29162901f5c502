"""Several adapters over one base: each ends with the bits that it has alone, and the base is there once."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.preference_rows import pairs, write
from tests.tiny_run import count_language_models
from tests.unit.train.test_resume import LIVELY, Crash, outcome

from luthier.adapt.state import adapter_parameters
from luthier.core.errors import CheckpointError, ConfigError, TrainingError
from luthier.train.many import check_together, lane_names, resume_many, train_many
from luthier.train.run import resume, train
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]

# Unlike each other in all that a step depends on: layers, ranks, methods, starts, dropout, seeds, numbers of steps.
RUNS: dict[str, dict[str, Any]] = {
    "wide": {"lora": {"r": 5, "lora_dropout": 0.2}, "train": LIVELY["train"]},
    "few": {
        "lora": {"r": 3, "target_modules": ["q_proj", "down_proj"], "use_dora": True, "lora_dropout": 0.3},
        "train": {"batch_rows": 4, "epochs": 2, "seed": 7, "loraplus_lr_ratio": 4.0},
    },
    "started": {
        "lora": {"r": 4, "init_lora_weights": "pissa", "target_modules": ["v_proj", "up_proj"]},
        "train": {"batch_rows": 2, "epochs": 1, "eval_every": 2, "save_every": 1},
        "data": {"limit": 9},
    },
    "looked": {"lora": {"r": 3, "init_lora_weights": "eva"}, "train": {"batch_rows": 6, "epochs": 3, "freeze_A": True}},
}


class Interrupting(io.StringIO):
    """A screen at which something happens once, when certain words are written to it."""

    def __init__(self, words: str, happens: Callable[[], None]):
        super().__init__()
        self.words, self.happens = words, happens

    def write(self, text: str) -> int:
        if self.words and self.words in text:
            self.words = ""
            self.happens()
        return super().write(text)


def crash() -> None:
    raise Crash


def settings_of(run_settings: Make, place: str, names: Any = RUNS, **sections: Any) -> list[RunSettings]:
    return [run_settings(out=f"{place}/{name}", **RUNS[name] | sections) for name in names]


@pytest.fixture(scope="module")
def alone(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with each of the runs trained by itself."""
    torch.set_num_threads(2)  # bits depend on it
    home = tmp_path_factory.mktemp("alone")
    for name, sections in RUNS.items():
        train(settings_in(home / name, **sections))
    return home


def same_as_alone(alone: Path, home: Path) -> bool:
    return all(outcome(home / name) == outcome(alone / name) for name in RUNS)


def test_each_run_ends_with_the_bits_that_it_has_alone(run_settings: Make, alone: Path, tmp_path: Path) -> None:
    before = count_language_models()
    screen = io.StringIO()
    done = train_many(settings_of(run_settings, "many"), console=Console(file=screen, width=120))
    assert same_as_alone(alone, tmp_path / "many")
    assert [each.adapter for each in done] == [tmp_path / "many" / name / "adapter" for name in RUNS]
    # One base, with four adapters in it.
    assert count_language_models() == before + 1
    model = done[0].prepared.base.model
    assert all(each.prepared.base.model is model for each in done)
    names = [each.prepared.adapter for each in done]
    assert names == ["run-wide", "run-few", "run-started", "run-looked"]
    own = [{id(item.parameter) for item in adapter_parameters(model, name)} for name in names]
    assert len(set.union(*own)) == sum(map(len, own))
    text = screen.getvalue()
    assert all(f"{name}: step" in text for name in RUNS)
    assert "summary" in text


@pytest.mark.parametrize(("words", "happens"), [("wide: step 3/", crash), ("few: step 4/", crash)])
def test_runs_that_were_killed_go_on_together_or_alone(
    run_settings: Make, alone: Path, tmp_path: Path, words: str, happens: Callable[[], None]
) -> None:
    with pytest.raises(Crash):
        train_many(settings_of(run_settings, "cut"), console=Console(file=Interrupting(words, happens), width=120))
    paths = [tmp_path / "cut" / name for name in RUNS]
    resume(paths[1])
    resume_many(paths)
    assert same_as_alone(alone, tmp_path / "cut")
    with pytest.raises(CheckpointError, match="all of these runs are finished"):
        resume_many(paths)


def test_a_signal_stops_all_at_checkpoints(run_settings: Make, alone: Path, tmp_path: Path) -> None:
    screen = Interrupting("wide: step 3/", lambda: signal.raise_signal(signal.SIGINT))
    done = train_many(settings_of(run_settings, "cut"), console=Console(file=screen, width=120))
    assert [(each.summary["ended"], each.summary["steps"]) for each in done] == [
        ("interrupted", 3),
        ("interrupted", 2),
        ("interrupted", 2),
        ("interrupted", 2),
    ]
    paths = [tmp_path / "cut" / name for name in RUNS]
    assert f"luthier train {' '.join(f'--resume {path}' for path in paths)}" in screen.getvalue()
    assert all(each.summary["ended"] == "finished" for each in resume_many(paths))
    assert same_as_alone(alone, tmp_path / "cut")


def test_replaced_modules_go_side_by_side_where_nothing_is_fused(run_settings: Make, tmp_path: Path) -> None:
    whole = {"lora": {"r": 3, "modules_to_save": ["norm"]}, "train": LIVELY["train"]}
    plain = {"lora": {"r": 2}, "train": LIVELY["train"]}

    def both(place: str, kernels: str) -> list[RunSettings]:
        runs = zip(("whole", "plain"), (whole, plain), strict=True)
        return [
            run_settings(out=f"{place}/{name}", lora=run["lora"], train=run["train"] | {"kernels": kernels}) for name, run in runs
        ]

    with pytest.raises(ConfigError, match=r"whole: its adapter replaces modules whole .* set train\.kernels to 'plain' in all"):
        train_many(both("fused", "fused"))
    assert not (tmp_path / "fused").exists()
    train_many(both("many", "plain"))
    for settings in both("alone", "plain"):
        train(settings)
        assert outcome(Path(settings.out)) == outcome(tmp_path / "many" / Path(settings.out).name)


def test_ranks_that_move_are_moved_in_their_own_run_only(run_settings: Make, tmp_path: Path) -> None:
    adalora = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}

    def both(place: str) -> list[RunSettings]:
        moving = run_settings(out=f"{place}/moving", train=LIVELY["train"]).model_dump(mode="json") | {"lora": adalora}
        return [RunSettings(**moving), run_settings(out=f"{place}/plain", lora={"r": 3}, train={"batch_rows": 2, "epochs": 3})]

    train_many(both("many"))
    for settings in both("alone"):
        train(settings)
        assert outcome(Path(settings.out)) == outcome(tmp_path / "many" / Path(settings.out).name)


def test_objectives_go_side_by_side_where_they_leave_the_base_alone(run_settings: Make, tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", pairs(10))
    preferences = {"path": str(tmp_path / "pairs.jsonl"), "eval_path": None, "eval_fraction": 0.3}

    (tmp_path / "reward.py").write_text("def score(prompt, completion, row):\n    return len(set(completion)) / 4 - 1\n")
    rewards = [{"function": f"{tmp_path / 'reward.py'}:score"}]

    def each(place: str) -> list[RunSettings]:
        sampling = {"kind": "grpo", "num_generations": 3, "max_new_tokens": 5, "beta": 0.1, "rewards": rewards}
        paid = {"objective": sampling, "lora": {"r": 2}, "train": {"batch_rows": 4, "max_steps": 3, "eval_every": 2}}
        liked = {"objective": {"kind": "dpo"}, "data": preferences, "lora": {"r": 4}}
        runs = {"paid": paid, "liked": liked, "wide": RUNS["wide"]}
        return [run_settings(out=f"{place}/{name}", **run) for name, run in runs.items()]

    train_many(each("many"))
    for settings in each("alone"):
        train(settings)
        assert outcome(Path(settings.out)) == outcome(tmp_path / "many" / Path(settings.out).name)
    scored = run_settings(out="scored", objective={"kind": "reward"}, data=preferences)
    with pytest.raises(ConfigError, match="scored: objective reward puts a head of its own into the base"):
        check_together([scored, run_settings(out="wide")])


def test_each_run_has_a_status_and_trackers_of_its_own(run_settings: Make, tmp_path: Path) -> None:
    names = ["wide", "few"]
    settings = settings_of(run_settings, "many", names)
    tracked = [each.changed(train=each.train.changed(track=["tensorboard"])) for each in settings]
    done = train_many(tracked)
    for name, each in zip(names, done, strict=True):
        assert [report["tracker"] for report in each.summary["tracking"]] == ["tensorboard"]
        assert list((tmp_path / "many" / name).rglob("events.out.tfevents*"))
        assert json.loads((tmp_path / "many" / name / "status.json").read_text())["status"] == "finished"


def test_a_run_that_fails_spares_the_others(run_settings: Make, alone: Path, tmp_path: Path) -> None:
    good = settings_of(run_settings, "some", ["wide"])
    bad = run_settings(out="some/bad", train={"learning_rate": 1e30, "warmup": 0.0, "batch_rows": 3, "eval_every": 100})
    with pytest.raises(TrainingError, match=r"bad: the .* is (nan|inf)") as error:
        train_many([*good, bad])
    assert f"go on with them by: luthier train --resume {good[0].out}" in str(error.value)
    told = [json.loads(Path(each.out, "status.json").read_text())["status"] for each in (*good, bad)]
    assert told == ["interrupted", "failed"]
    resume(good[0].out)
    assert outcome(tmp_path / "some/wide") == outcome(alone / "wide")


def test_runs_that_cannot_share_a_base_are_told_every_reason(run_settings: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train_many(
            [
                run_settings(out="a"),
                run_settings(out="a", dtype="bfloat16", train={"kernels": "plain"}),
                run_settings(out="b", quantize="nf4", lora={"init_lora_weights": "loftq"}),
            ]
        )
    text = str(error.value)
    assert "dtype is of the base, so it must be the same: " in text and "'bfloat16' in " in text
    assert "quantize is of the base" in text
    assert "train.kernels is of the base" in text
    assert "init 'loftq' makes 4-bit weights of its own" in text
    assert "a is named by 2 runs" in text
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="no runs were given"):
        check_together([])


def test_names_in_the_model_are_those_of_the_folders(run_settings: Make) -> None:
    outs = ["runs/orders v2.1", "other/orders-v2-1", "lora", "ÄÖ"]
    names = lane_names([run_settings(out=out) for out in outs])
    assert names == ["run-orders-v2-1", "run-orders-v2-1-2", "run-lora", "run-"]
    # Neither twice the same name nor that of another's frozen copy.
    assert lane_names([run_settings(out=out) for out in ("a/x", "b/x-2", "c/x", "d/x-start")]) == [
        "run-x", "run-x-2", "run-x-3", "run-x-start-2"
    ]  # fmt: skip


def test_logs_hold_their_own_steps_only(run_settings: Make, tmp_path: Path) -> None:
    train_many(settings_of(run_settings, "many", ["wide", "few"]))
    for name in ("wide", "few"):
        steps = [json.loads(line) for line in (tmp_path / "many" / name / "run.jsonl").read_text().splitlines()]
        losses = [record["step"] for record in steps if "loss" in record]
        assert losses == list(range(1, len(losses) + 1))
