"""A run that was stopped and resumed is the run that was not; and what cannot be resumed is refused by name."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_run import save_tiny_model, write_rows

from luthier.adapt import fusing
from luthier.core.errors import BaseMismatchError, CheckpointError, LuthierError, StorageError
from luthier.train.estimate import _kept_bytes
from luthier.train.loop import Trainer
from luthier.train.prepare import prepare
from luthier.train.records import StepRecord
from luthier.train.run import resume, train
from luthier.train.runfolder import Progress, RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]

LIVELY = {
    "lora": {"lora_dropout": 0.2},
    "train": {"accumulate": 2, "batch_rows": 3, "eval_every": 3, "save_every": 1, "learning_rate": 0.05, "epochs": 3},
}
STOPS = {"train": {"epochs": 60, "learning_rate": 0.1, "warmup": 0.0, "schedule": "constant", "eval_every": 2, "patience": 2}}


class Crash(Exception):
    """Stands for the power going out: nothing in luthier catches it."""


class CrashAt:
    """An observer that ends the run in the middle of everything, after a step or after an evaluation."""

    def __init__(self, step: int, after: str = "step"):
        self.step, self.after = step, after

    def on_step(self, record: StepRecord) -> None:
        if self.after == "step" and record.step == self.step:
            raise Crash

    def on_eval(self, record: object) -> None:
        if self.after == "eval" and record.step == self.step:
            raise Crash


def crashed_run(settings: RunSettings, step: int, after: str = "step") -> Path:
    """Start a run that ends at `step` without notice, and return its folder."""
    trainer = Trainer(prepare(settings), RunFolder.create(settings), CrashAt(step, after))
    with pytest.raises(Crash):
        trainer.run()
    return trainer.folder.path


def outcome(folder: Path) -> dict[str, object]:
    """Return all that two equal runs have in common; only clocks, and the names of the folders, may differ."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    log = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {
        "adapter": {file.name: file.read_bytes() for file in (folder / "adapter").iterdir()},
        "log": [{key: value for key, value in record.items() if key != "seconds"} for record in log],
        "checkpoints": {
            path.name: ((path / "optimizer.safetensors").read_bytes(), (path / "adapter/adapter_model.safetensors").read_bytes())
            for path in checkpoints
        },
    }


@pytest.fixture(scope="module")
def whole_run(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a lively run that nobody stopped: 9 steps, 3 evaluations."""
    torch.set_num_threads(2)  # as in every test, but this may come before the first: bits depend on the number of threads
    settings = settings_in(tmp_path_factory.mktemp("whole") / "run", **LIVELY)
    train(settings)
    folder = Path(settings.out)
    assert len(RunFolder(folder).read_log()) == 9 + 3
    return folder


@pytest.mark.parametrize(("step", "after"), [(1, "step"), (3, "eval"), (4, "step"), (8, "step"), (9, "eval")])
def test_a_resumed_run_ends_with_the_same_bits(run_settings: Make, whole_run: Path, step: int, after: str) -> None:
    cut = crashed_run(run_settings(**LIVELY), step, after)
    torch.manual_seed(99)
    resume(cut)
    assert outcome(cut) == outcome(whole_run)


def test_a_run_resumed_again_and_again_ends_with_the_same_bits(run_settings: Make, whole_run: Path) -> None:
    cut = crashed_run(run_settings(**LIVELY), 2)
    for step in (4, 5, 7):
        folder, settings = RunFolder.open(cut)
        found = folder.load_checkpoint()
        assert found is not None
        trainer = Trainer(prepare(settings, adapter=found[2]), folder, CrashAt(step))
        trainer.restore(found[0], found[1])
        with pytest.raises(Crash):
            trainer.run()
    resume(cut)
    assert outcome(cut) == outcome(whole_run)


def test_a_full_fine_tune_resumes_with_the_same_bits(run_settings: Make) -> None:
    ways = {"train": LIVELY["train"] | {"full": True, "learning_rate": 0.001}, "lora": {"r": 16}}
    whole = run_settings(out="whole", **ways)
    train(whole)
    cut = crashed_run(run_settings(out="cut", **ways), 4)
    resume(cut)
    assert outcome(cut) == outcome(Path(whole.out))


def test_groups_and_frozen_factors_resume_with_the_same_bits(run_settings: Make) -> None:
    ways = {"train": LIVELY["train"] | {"loraplus_lr_ratio": 4.0, "freeze_A": True, "weight_decay": 0.1, "learning_rate": 0.01}}
    whole = run_settings(out="whole", **ways, lora={"modules_to_save": ["norm"], "init_lora_weights": "eva"})
    train(whole)
    cut = crashed_run(run_settings(out="cut", **ways, lora={"modules_to_save": ["norm"], "init_lora_weights": "eva"}), 4)
    resume(cut)
    assert outcome(cut) == outcome(Path(whole.out))


def test_a_run_on_the_parameters_of_experts_resumes_with_the_same_bits(
    run_settings: Make, tiny_moe: Callable, tiny_tokenizer: object, tmp_path: Path
) -> None:
    def mixtral(**settings: int) -> torch.nn.Module:
        return tiny_moe("mixtral", layers=1, **settings)

    sections = {
        "model": str(save_tiny_model(tmp_path / "mixtral", mixtral, tiny_tokenizer)),
        "lora": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        "train": LIVELY["train"] | {"loraplus_lr_ratio": 4.0, "learning_rate": 0.01},
    }
    whole = run_settings(out="whole", **sections)
    train(whole)
    cut = crashed_run(run_settings(out="cut", **sections), 4)
    resume(cut)
    assert outcome(cut) == outcome(Path(whole.out))
    stored = load_file(cut / "adapter/adapter_model.safetensors")
    assert len(stored) == 4 and all(tensor.any() for tensor in stored.values())
    # Of the sums the graph keeps that of down_proj, in float32 and once; the input of gate_up_proj needs no gradient here.
    trainer = Trainer(prepare(run_settings(out="kept", **sections)), RunFolder.create(run_settings(out="kept", **sections)))
    assert _kept_bytes(trainer)[1] == 4 * 5 * 16 * 24


@pytest.mark.parametrize("init", ["pissa_niter_2", "orthogonal"])
def test_what_pairs_began_with_is_taken_up_from_the_checkpoint(init: str, run_settings: Make) -> None:
    """Their start is not worked out again: another number of threads, or another seed, would give another one."""
    began = {
        "lora": {"r": 4, "lora_dropout": 0.2, "init_lora_weights": init, "modules_to_save": ["norm"]},
        "train": LIVELY["train"],
    }
    whole = run_settings(out="whole", **began)
    train(whole)
    cut = crashed_run(run_settings(out="cut", **began), 4)
    folder, settings = RunFolder.open(cut)
    found = folder.load_checkpoint()
    assert found is not None
    trainer = Trainer(prepare(settings, adapter=found[2]), folder)
    with torch.no_grad():
        for item in trainer.items:
            item.parameter.normal_()
        for pair in trainer.started.values():
            pair.start_A.normal_()
            pair.start_B.normal_()
    trainer.restore(found[0], found[1])
    assert trainer.run() == "finished"
    trainer.take_best()
    trainer.write_adapter(folder.adapter, {"eval_loss": trainer.progress.best_loss})
    assert outcome(cut) == outcome(Path(whole.out))


def test_a_start_is_resumed_on_its_own_base_only(run_settings: Make, tiny_folder: Path, tmp_path: Path) -> None:
    cut = crashed_run(run_settings(lora={"r": 4, "init_lora_weights": "pissa"}, train=LIVELY["train"]), 2)
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    text = (cut / "config.toml").read_text()
    (cut / "config.toml").write_text(text.replace(str(tiny_folder), str(other)))
    with pytest.raises(BaseMismatchError):
        resume(cut)


def test_a_run_that_lost_its_end_after_an_early_stop_goes_no_step_further(run_settings: Make) -> None:
    whole = run_settings(out="whole", **STOPS)
    summary = train(whole).summary
    assert summary["ended"] == "early stop"
    # Everything was trained and saved, and then the process was gone before it wrote the adapter.
    again = run_settings(out="again", **STOPS)
    assert Trainer(prepare(again), RunFolder.create(again)).run() == "early stop"
    assert not (Path(again.out) / "adapter").exists()
    resumed = resume(again.out).summary
    assert (resumed["ended"], resumed["steps"], resumed["best_step"]) == ("early stop", summary["steps"], summary["best_step"])
    assert outcome(Path(again.out)) == outcome(Path(whole.out))


def test_without_a_checkpoint_a_run_begins_anew(run_settings: Make) -> None:
    slow = {"train": {"batch_rows": 2, "epochs": 1, "eval_every": 50}, "lora": {"lora_dropout": 0.2}}
    whole = run_settings(out="whole", **slow)
    train(whole)
    cut = crashed_run(run_settings(out="cut", **slow), 3)
    assert not (cut / "checkpoints").exists()
    assert len((cut / "run.jsonl").read_text().splitlines()) == 3
    resume(cut)
    assert outcome(cut) == outcome(Path(whole.out))


def test_a_line_written_by_half_is_passed_over(run_settings: Make) -> None:
    cut = crashed_run(run_settings(**LIVELY), 5)
    whole = (cut / "run.jsonl").read_text()
    (cut / "run.jsonl").write_text(whole + '{"step": 6, "lo')
    summary = resume(cut).summary
    assert summary["steps"] == 9
    steps = [record["step"] for record in RunFolder(cut).read_log() if "loss" in record]
    assert steps == list(range(1, 10))


def test_what_a_killed_writer_left_is_cleared_away(run_settings: Make) -> None:
    cut = crashed_run(run_settings(**LIVELY), 5)
    left = cut / "checkpoints" / ".step-000005-abc.tmp"
    (left / "adapter").mkdir(parents=True)
    (cut / ".summary.json-xyz.tmp").write_text("{")
    resume(cut)
    assert not left.exists()
    assert not (cut / ".summary.json-xyz.tmp").exists()


def with_own_rows(run_settings: Make, folder: Path) -> RunSettings:
    rows = {
        "path": str(write_rows(folder / "own.jsonl", 13)),
        "eval_path": str(write_rows(folder / "own-held-out.jsonl", 5, start=50)),
    }
    return run_settings(data=rows, **LIVELY)


def test_changed_rows_are_refused(run_settings: Make, tmp_path: Path) -> None:
    settings = with_own_rows(run_settings, tmp_path)
    cut = crashed_run(settings, 4)
    write_rows(Path(settings.data.path), 14)
    with pytest.raises(CheckpointError, match="are not those this run began with"):
        resume(cut)
    write_rows(Path(settings.data.path), 13)
    write_rows(Path(settings.data.eval_path or ""), 6, start=50)
    with pytest.raises(CheckpointError, match="are not those this run began with"):
        resume(cut)


def test_another_number_of_threads_is_told(run_settings: Make, caplog: pytest.LogCaptureFixture) -> None:
    cut = crashed_run(run_settings(**LIVELY), 5)
    torch.set_num_threads(1)
    resume(cut)
    assert "this run went on 2 threads so far and goes on with 1" in caplog.text
    assert "OMP_NUM_THREADS=2" in caplog.text


def test_changed_settings_are_refused(run_settings: Make) -> None:
    cut = crashed_run(run_settings(**LIVELY), 4)
    text = (cut / "config.toml").read_text()
    (cut / "config.toml").write_text(text.replace("learning_rate = 0.05", "learning_rate = 0.06"))
    with pytest.raises(CheckpointError, match=r"config\.toml are not those"):
        resume(cut)


def test_a_model_that_is_fused_differently_now_is_refused(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = crashed_run(run_settings(**LIVELY), 4)
    # As with a version of transformers whose attention is no longer known: rows would be padded, and fall into other steps.
    monkeypatch.setattr(fusing, "FUSIBLE", ("gpt2",))
    with pytest.raises(CheckpointError, match="rows would meet in other steps"):
        resume(cut)


def test_a_moved_run_and_moved_rows_can_be_resumed(run_settings: Make, tmp_path: Path) -> None:
    settings = with_own_rows(run_settings, tmp_path)
    cut = crashed_run(settings, 4)
    moved = cut.rename(tmp_path / "moved")
    Path(settings.data.path).rename(tmp_path / "other.jsonl")
    text = (moved / "config.toml").read_text()
    (moved / "config.toml").write_text(text.replace("own.jsonl", "other.jsonl"))
    assert resume(moved).summary["run"] == str(moved)


def test_another_base_is_refused(run_settings: Make, tiny_llama: Callable, tiny_tokenizer: object, tmp_path: Path) -> None:
    from tests.tiny_run import save_tiny_model

    base = save_tiny_model(tmp_path / "base", tiny_llama, tiny_tokenizer, hidden=32, seed=1)
    cut = crashed_run(run_settings(model=str(base), **LIVELY), 4)
    save_tiny_model(base, tiny_llama, tiny_tokenizer, hidden=32, seed=2)
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        resume(cut)


def test_a_finished_run_is_not_resumed_and_not_begun_again(run_settings: Make) -> None:
    settings = run_settings(train={"max_steps": 2})
    train(settings)
    before = outcome(Path(settings.out))
    with pytest.raises(CheckpointError, match="is finished; its adapter is"):
        resume(settings.out)
    with pytest.raises(CheckpointError, match="holds a run; continue it with --resume"):
        train(settings)
    assert outcome(Path(settings.out)) == before


def test_a_folder_that_is_no_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a run folder: it has no config\.toml"):
        resume(tmp_path)


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "run.jsonl", "summary.json", "loss.png"])
def test_a_folder_with_other_peoples_things_is_left_alone(run_settings: Make, name: str) -> None:
    settings = run_settings()
    Path(settings.out, name).mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"holds {name}, which this run would write"):
        train(settings)
    assert [entry.name for entry in Path(settings.out).iterdir()] == [name]


@pytest.fixture(scope="module")
def crashed_at_5(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crashed_run(settings_in(tmp_path_factory.mktemp("crashed") / "run", **LIVELY), 5)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("optimizer.safetensors", lambda raw: raw[:-5]),
        ("optimizer.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("state.json", lambda raw: raw[:-9]),
        ("state.json", lambda raw: raw.replace(b'"evals_without_gain": ', b'"evals_without_gain": 1')),
        ("state.json", lambda raw: b"[1, 2]"),
        ("state.json", lambda raw: b'{"step": 6}'),
        ("state.json", lambda raw: raw.replace(b'"tokens"', b'"tokns"')),
        ("adapter/adapter_model.safetensors", lambda raw: raw[:-5]),
        ("adapter/adapter_model.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("adapter/luthier.json", lambda raw: b"{"),
        ("adapter/adapter_config.json", None),
        ("optimizer.safetensors", None),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(
    crashed_at_5: Path, file: str, damage: Callable[[bytes], bytes] | None, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(crashed_at_5, cut)
    *before, last = sorted((cut / "checkpoints").iterdir())
    if damage is None:
        (last / file).unlink()
    else:
        (last / file).write_bytes(damage((last / file).read_bytes()))
    with pytest.raises(CheckpointError) as error:
        resume(cut)
    assert str(error.value).startswith(f"the checkpoint {last} is damaged")
    assert f"Remove {last} to continue from {before[-1]}" in str(error.value)


def test_removing_a_damaged_checkpoint_leads_to_the_same_end(run_settings: Make, whole_run: Path) -> None:
    cut = crashed_run(run_settings(**LIVELY), 5)
    shutil.rmtree(max((cut / "checkpoints").iterdir()))
    resume(cut)
    assert outcome(cut) == outcome(whole_run)


def test_the_last_checkpoint_is_the_one_of_the_highest_number(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (999_999, 1_000_000):
        (run.step_folder(step)).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="step-1000000 is damaged"):
        run.load_checkpoint()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one MiB, which only root may."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_and_spares_the_checkpoint(run_settings: Make, small_disk: Path) -> None:
    # One checkpoint of rank 80 is 0.6 MB: the first fits, the second does not beside it.
    big = {"lora": {"r": 80}, "train": {"batch_rows": 2, "epochs": 1, "save_every": 2, "eval_every": 7}}
    with pytest.raises(StorageError, match="no space left on the device") as error:
        train(run_settings(**big, out="disk/run"))
    assert isinstance(error.value, OSError)
    run = RunFolder(small_disk / "run")
    found = run.load_checkpoint()
    assert found is not None
    assert found[0].step == 2
    assert not list(run.checkpoints.glob(".*"))

    # With room again the run goes on to the end that it would have had.
    subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
    resume(run.path)
    whole = run_settings(out="whole", **big)
    train(whole)
    assert outcome(run.path) == outcome(Path(whole.out))


def test_a_full_disk_while_logging_is_a_storage_error(small_disk: Path) -> None:
    run = RunFolder(small_disk)
    (small_disk / "filler").write_bytes(bytes(2**20 - 8192))
    with pytest.raises(StorageError, match="cannot write the log"):
        run.append_log({"step": 1, "loss": "x" * 100_000})


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)

    def fails(folder: Path) -> None:
        folder.mkdir()
        (folder / "half").write_text("written")
        raise Crash

    with pytest.raises(Crash):
        run.save_checkpoint(Progress(step=1), {}, fails)
    assert list(run.checkpoints.iterdir()) == []
    assert run.load_checkpoint() is None


def test_errors_of_a_run_are_luthiers_own(run_settings: Make) -> None:
    for wrong in ({"data": {"path": "absent.jsonl"}}, {"model": "absent-model"}, {"lora": {"target_modules": ["q_prj"]}}):
        settings = run_settings(**wrong)
        with pytest.raises(LuthierError):
            train(settings)
        assert not Path(settings.out).exists()
