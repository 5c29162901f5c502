"""Runs that learn from rewards of the model's own answers, on a tiny model: GRPO and PPO."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_run import save_tiny_model, write_rows

from luthier.core.errors import ConfigError, DataError, TrainingError
from luthier.data.batches import collate
from luthier.engine.score import answer_log_probs_and_hidden
from luthier.engine.store import AdapterStore
from luthier.formats.adapters import live_folder, save_adapter
from luthier.formats.folder import read_adapter
from luthier.train.loop import Trainer
from luthier.train.objectives import rollouts as rollouts_module
from luthier.train.objectives.grpo import Grpo
from luthier.train.objectives.ppo import Ppo
from luthier.train.objectives.rollouts import RolloutObjective, seed_of
from luthier.train.objectives.samplers import EngineSampler, ModelSampler
from luthier.train.prepare import prepare
from luthier.train.run import resume, train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]
SHORT: dict[str, Any] = {"max_new_tokens": 5, "prompts": 3}
REWARDS = """
def capitals(prompt, completion, row):
    return sum(letter.isupper() for letter in completion) / 8

def small(prompt, completion, row):
    return float(sum(ord(letter) < 100 for letter in completion)) / 5

def same(prompt, completion, row):
    return 0.5

def odd(prompt, completion, row):
    return 1.0 if len(prompt[-1]["content"]) % 2 else len(completion) % 7
"""


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("judge") / "judge.py"
    file.write_text(REWARDS)
    return file


@pytest.fixture(scope="module")
def lively(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model with weights so large that some tokens are far likelier than others, or can become so."""
    folder = tmp_path_factory.mktemp("lively") / "model"
    return save_tiny_model(folder, tiny_llama, tiny_tokenizer, hidden=32, layers=1, initializer_range=0.2)


@pytest.fixture
def settings_of(settings_in: Make, judge: Path, tmp_path: Path) -> Make:
    """Return a factory of settings: kind, name of the reward function, and the rest of the objective."""

    def make(kind: str, reward: str = "small", *, out: str = "run", train: dict | None = None, **objective: Any) -> RunSettings:
        given = {"kind": kind, "rewards": [{"function": f"{judge}:{reward}"}], **SHORT} | objective
        loop = {"batch_rows": None, "learning_rate": 1e-2, "compile": "off"} | (train or {})
        return settings_in(tmp_path / out, objective=given, train=loop)

    return make


def begun(settings: RunSettings) -> tuple[Trainer, RolloutObjective]:
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    assert isinstance(trainer.objective, RolloutObjective)
    return trainer, trainer.objective


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return a run's log without what clocks say."""
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines]


def tokens_of(objective: RolloutObjective) -> list[list[int]]:
    assert objective.rollout is not None
    return [row.input_ids for row in objective.rollout.rows]


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rate", "objective"),
    [
        ("grpo", 0.05, {}),
        ("grpo", 0.05, {"beta": 0.01, "iterations": 2, "loss": "grpo"}),
        ("ppo", 0.1, {"iterations": 2, "num_generations": 4}),
    ],
)
def test_a_trivial_reward_rises(kind: str, rate: float, objective: dict[str, Any], settings_of: Make, lively: Path) -> None:
    steps = 20 * objective.get("iterations", 1)
    loop = {"epochs": 40, "max_steps": steps, "learning_rate": rate, "eval_every": steps, "warmup": 0.0}
    settings = settings_of(kind, train=loop, prompts=6, **objective).changed(model=str(lively))
    outcome = train(settings)
    steps_of = [line for line in log_of(Path(settings.out)) if "reward" in line]
    first = sum(line["reward"] for line in steps_of[:4]) / 4
    last = sum(line["reward"] for line in steps_of[-4:]) / 4
    assert last > first + 0.06
    (held_out,) = [line for line in log_of(Path(settings.out)) if "eval_reward" in line]
    assert held_out["eval_loss"] == -held_out["eval_reward"]
    assert outcome.summary["reward"] > first


def test_the_loss_of_answers_without_advantage_is_left_out_and_counted(settings_of: Make) -> None:
    settings = settings_of("grpo", "odd", prompts=6, train={"batch_tokens": 100})
    trainer, objective = begun(settings)
    planned = trainer.prepared.steps[0][1]
    with trainer.running():
        batches = objective.step_batches(0, planned)
        rollout = objective.rollout
        assert rollout is not None
        taught = sum(any(each) for each in rollout.advantages.split(rollout.lengths))
        assert 0 < taught < len(rollout.rows), "the reward should leave some groups without variance, and not all"
        assert sum(len(batch.data.rows) for batch in batches) == taught
        assert sum(batch.weight for batch in batches) == sum(rollout.lengths)
        short = sum(float(objective.loss(batch)[0].detach()) for batch in batches)
        whole = float(objective.loss(objective._batch(rollout))[0].detach())
    assert short == pytest.approx(whole, abs=1e-5)


def test_micro_batches_change_nothing(settings_of: Make) -> None:
    """The gradient of a step is the same however its answers are cut into passes."""
    found = []
    for name, tokens in (("small", 60), ("large", 4000)):
        settings = settings_of("grpo", out=name, loss="grpo", beta=0.1, train={"batch_tokens": tokens})
        trainer, objective = begun(settings)
        with trainer.running():
            batches = objective.step_batches(0, trainer.prepared.steps[0][1])
            total = sum(batch.weight for batch in batches)
            for batch in batches:
                (objective.loss(batch)[0] / total).backward()
        found.append((len(batches), [item.parameter.grad for item in trainer.items], tokens_of(objective)))
    (few, gradients, ids), (many, others, other_ids) = found
    assert few > many
    assert ids == other_ids
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_engine_and_model_give_the_same_answers_and_see_the_adapter_as_it_is(settings_of: Make) -> None:
    trainer, objective = begun(settings_of("grpo"))
    prompts = [row.input_ids[:-1] for row in trainer.prepared.rows.train.rows[:4] for _ in range(3)]
    seeds = [seed_of(0, 0, place // 3, place % 3) for place in range(len(prompts))]
    engine = EngineSampler(trainer.prepared, objective.settings)
    model = ModelSampler(trainer.prepared, objective.settings)
    try:
        seen = []
        for moved in (False, True):
            if moved:
                with torch.no_grad():
                    for item in trainer.items:
                        item.parameter.add_(torch.randn_like(item.parameter))
            for chosen in (seeds, None):
                answers = engine.answer(prompts, chosen)
                assert answers == model.answer(prompts, chosen)
                seen.append([answer.token_ids for answer in answers])
        assert seen[0] != seen[2], "the adapter that moved should have changed what is sampled"
        assert len({tuple(ids) for ids in seen[0][:3]}) > 1, "answers to one prompt have seeds of their own"
        assert len({tuple(ids) for ids in seen[1][:3]}) == 1, "the likeliest answer is one"
        (held,) = engine.engine.stats()["adapters"].adapters
        assert (held.name, held.state) == (engine.name, "resident")
    finally:
        engine.close()


def test_an_engine_that_kept_an_old_adapter_is_found_out(settings_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store is made to give what it read first under every name."""
    trainer, objective = begun(settings_of("grpo"))
    engine = EngineSampler(trainer.prepared, objective.settings)
    first: list[Any] = []
    add = AdapterStore.add

    def stale(self: AdapterStore, name: str, source: Any, **more: Any) -> Any:
        first.append(source)
        return add(self, name, first[0], **more)

    monkeypatch.setattr(AdapterStore, "add", stale)
    try:
        engine.take_adapter()
        with torch.no_grad():
            trainer.items[0].parameter.add_(1)
        with pytest.raises(RuntimeError, match="holds another adapter than the one in training"):
            engine.take_adapter()
    finally:
        engine.close()


def test_the_live_adapter_is_what_would_be_read_from_disk(settings_of: Make, tmp_path: Path) -> None:
    trainer, _ = begun(settings_of("grpo"))
    live = live_folder(trainer.model, "default", base=trainer.prepared.fingerprint)
    read = read_adapter(save_adapter(trainer.model, tmp_path / "adapter"))
    assert live.config == read.config
    assert {name: live.digests[name] for name in live.digests} == {name: read.digests[name] for name in live.digests}
    assert live.tensors.keys() == read.tensors.keys()
    assert all(torch.equal(live.tensors[name], read.tensors[name]) for name in read.tensors)


@pytest.mark.parametrize("way", ["engine", "model"])
def test_the_way_of_answering_can_be_chosen(way: str, settings_of: Make) -> None:
    trainer, objective = begun(settings_of("grpo", rollouts=way))
    with trainer.running():
        objective.step_batches(0, trainer.prepared.steps[0][1])
        assert isinstance(objective.sampler, EngineSampler if way == "engine" else ModelSampler)
    assert objective.sampler is None, "what answers is given back when the run ends"


def test_rollouts_of_an_adapter_that_the_engine_would_merge(settings_in: Make, judge: Path, tmp_path: Path) -> None:
    def make(out: str, way: str) -> RunSettings:
        objective = {"kind": "grpo", "rewards": [{"function": f"{judge}:small"}], "rollouts": way, **SHORT}
        lora = {"target_modules": ["q_proj"], "modules_to_save": ["down_proj"]}
        return settings_in(tmp_path / out, objective=objective, train={"compile": "off"}, lora=lora)

    trainer, objective = begun(make("auto", "auto"))
    with trainer.running():
        objective.step_batches(0, trainer.prepared.steps[0][1])
        assert isinstance(objective.sampler, ModelSampler)
    trainer, objective = begun(make("engine", "engine"))
    with trainer.running(), pytest.raises(ConfigError, match=r"down_proj.*use 'auto' or 'model'"):
        objective.step_batches(0, trainer.prepared.steps[0][1])


def test_answers_end_with_the_token_that_ended_them(settings_of: Make) -> None:
    trainer, objective = begun(settings_of("grpo", max_new_tokens=120, prompts=6))
    stop = trainer.prepared.base.tokenizer.eos_token_id
    with trainer.running():
        objective.step_batches(0, trainer.prepared.steps[0][1])
    rollout = objective.rollout
    assert rollout is not None
    for row, is_cut in zip(rollout.rows, rollout.is_cut.tolist(), strict=True):
        answer = [label for label in row.labels if label >= 0]
        assert len(answer) <= 120
        if is_cut:
            assert len(answer) == 120
        else:
            assert answer[-1] == stop or answer[-1] == trainer.model.generation_config.eos_token_id
    assert 0 < int(rollout.is_cut.sum()) < len(rollout.rows), "both ends should be seen"


# --- what is told ---------------------------------------------------------------------------------------------------


def test_groups_without_variance_are_counted_and_told(
    settings_of: Make, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollouts_module, "EQUAL_STEPS", 3)
    settings = settings_of("grpo", "same", train={"max_steps": 4})
    with caplog.at_level(logging.WARNING):
        train(settings)
    steps = [line for line in log_of(Path(settings.out)) if "reward" in line]
    names = ("reward", "zero_variance", "loss", "grad_norm")
    assert [[line[name] for name in names] for line in steps] == [[0.5, 1.0, 0.0, 0.0]] * 4
    assert [line for line in caplog.messages if "in the last 3 samplings" in line] != []


def test_the_share_of_groups_without_variance(settings_of: Make) -> None:
    trainer, objective = begun(settings_of("grpo", "odd", prompts=6))
    with trainer.running():
        objective.step_batches(0, trainer.prepared.steps[0][1])
    rollout = objective.rollout
    assert rollout is not None
    groups = [set(each.tolist()) for each in rollout.rewards.split(8)]
    wanted = sum(len(group) == 1 for group in groups) / len(groups)
    figures = objective.figures()
    assert 0 < wanted < 1
    assert figures["zero_variance"] == wanted
    assert next(iter(figures)) == "reward"
    assert figures["reward"] == pytest.approx(float(rollout.rewards.mean()))
    assert figures["reward_std"] == pytest.approx(float(rollout.rewards.std(correction=0)), rel=1e-4)


def test_several_rewards_are_weighed_and_told_apart(settings_in: Make, judge: Path, tmp_path: Path) -> None:
    sources = [{"function": f"{judge}:capitals", "weight": 2.0}, {"max_length": 4, "weight": -1.0}]
    settings = settings_in(
        tmp_path / "run", objective={"kind": "grpo", "rewards": sources, **SHORT}, train={"max_steps": 2, "eval_every": 2}
    )
    train(settings)
    step, *_, held_out = log_of(Path(settings.out))
    assert step["reward"] == pytest.approx(2 * step["reward/capitals"] - step["reward/max_length"], abs=1e-6)
    assert held_out["eval_reward"] == pytest.approx(2 * held_out["eval_reward/capitals"] - held_out["eval_reward/max_length"])


def test_a_reward_that_fails_ends_the_run_with_its_checkpoint_intact(settings_in: Make, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "calls = []\n"
        "def score(prompts, completions, rows):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2: raise OSError('the judge is gone')\n"
        "    return [float(len(each)) for each in completions]\n"
    )
    objective = {"kind": "grpo", "rewards": [{"function": f"{tmp_path / 'judge.py'}:score"}], **SHORT}
    data = {"eval_path": None, "eval_fraction": 0}
    settings = settings_in(tmp_path / "run", objective=objective, data=data, train={"save_every": 1})
    with pytest.raises(TrainingError, match=r"judge.py:score raised OSError: the judge is gone on 24 answers"):
        train(settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]


# --- resuming -------------------------------------------------------------------------------------------------------


class Crash(Exception):
    """Stands for the power going out."""


class CrashAt:
    def __init__(self, step: int):
        self.step = step

    def on_step(self, record: Any) -> None:
        if record.step == self.step:
            raise Crash

    def on_eval(self, record: Any) -> None: ...


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("grpo", {}),
        ("grpo", {"iterations": 3, "beta": 0.1, "top_p": 0.9, "temperature": 1.3}),
        ("grpo", {"rollouts": "model"}),
        ("ppo", {"iterations": 3}),
    ],
)
def test_a_run_that_was_killed_amid_a_rollout_ends_with_the_same_bits(
    kind: str, objective: dict[str, Any], settings_of: Make, tmp_path: Path
) -> None:
    loop = {"max_steps": 7, "eval_every": 4, "save_every": 1, "epochs": 5}
    whole = settings_of(kind, out="whole", train=loop, **objective)
    train(whole)
    cut = settings_of(kind, out="cut", train=loop, **objective)
    trainer = Trainer(prepare(cut), RunFolder.create(cut), CrashAt(6))
    with pytest.raises(Crash):
        trainer.run()  # the last checkpoint is that of step 5, the second step of the second rollout
    resume(cut.out)
    assert log_of(Path(cut.out)) == log_of(Path(whole.out))
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-000007/optimizer.safetensors"):
        assert (Path(cut.out) / name).read_bytes() == (Path(whole.out) / name).read_bytes()


def test_a_checkpoint_between_rollouts_holds_no_answers(settings_of: Make) -> None:
    settings = settings_of("grpo", iterations=2, train={"max_steps": 3, "save_every": 1, "eval_every": 1})
    trainer, objective = begun(settings)
    held = []
    with trainer.running():
        while trainer.advance() is None:
            held.append(sorted(objective.state()))
    assert held[1] == []
    assert "rollout.ids" in held[0]


# --- PPO ------------------------------------------------------------------------------------------------------------


def test_values_are_learnt_and_are_no_part_of_the_adapter(settings_of: Make) -> None:
    settings = settings_of("ppo", train={"max_steps": 4, "save_every": 1})
    trainer, objective = begun(settings)
    assert isinstance(objective, Ppo)
    trainer.run()
    assert bool(objective.head.weight.any())
    folder = RunFolder(settings.out)
    assert not [name for name in read_adapter(folder.step_folder(4) / "adapter").tensors if "value" in name]
    state = folder.optimizer_state(4)
    assert torch.equal(state["objective.value_head.weight"], objective.head.weight.detach())
    index = len(trainer.parameters) - 2
    assert state[f"exp_avg.{index:05d}"].shape == objective.head.weight.shape
    log = [line for line in log_of(Path(settings.out)) if "reward" in line]
    assert {"policy_loss", "value_loss", "kl", "clipped"} <= log[-1].keys()
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6), "the policy begins as the reference"


@pytest.mark.parametrize("packed", [True, False])
def test_hidden_states_come_with_the_log_probabilities_they_lead_to(packed: bool, settings_of: Make) -> None:
    trainer, objective = begun(settings_of("ppo", train={"packing": packed}))
    rows = [objective.rows.item(index)[0] for index in (0, 4, 2)]
    batch = objective.batch_of(rows)
    assert (type(batch).__name__ == "PackedBatch") is packed
    model, temperature = trainer.model, 1.7
    with torch.no_grad():
        found, rows_K, hidden_KI = answer_log_probs_and_hidden(model, batch, temperature=temperature)
        for place, row in enumerate(rows):
            one = collate([row], 0, multiple_of=1)
            output = model(input_ids=one.input_ids, output_hidden_states=True)
            wanted = (output.logits[0, :-1].double() / temperature).log_softmax(-1)
            begin = next(index for index, label in enumerate(row.labels) if label >= 0)
            chosen = [float(wanted[index - 1, row.input_ids[index]]) for index in range(begin, len(row))]
            assert found[rows_K == place].tolist() == pytest.approx(chosen, rel=1e-5)
            states = output.hidden_states[-1][0, begin - 1 : -1]
            torch.testing.assert_close(hidden_KI[rows_K == place], states, rtol=1e-4, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"epsilon": 0.1}, "epsilon would have no effect: with iterations = 1"),
        ({"unbiased_kl": False}, "unbiased_kl has no effect without beta"),
        ({"num_generations": 1}, "num_generations"),
        ({"train": {"accumulate": 2}}, "train.accumulate has no effect with objective 'grpo'"),
        ({"train": {"shard": "fsdp2"}}, "leave train.shard out"),
        ({"iterations": 2, "train": {"processes": 2}}, "needs one process"),
    ],
)
def test_settings_without_effect_are_refused(given: dict[str, Any], told: str, settings_of: Make) -> None:
    with pytest.raises(ConfigError, match=told):
        settings_of("grpo", **given)


def test_prompts_that_leave_no_room_are_refused_before_anything_is_written(settings_of: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this model reads 256 at most"):
        train(settings_of("grpo", max_new_tokens=250))
    assert not (tmp_path / "run").exists()


def test_prompts_that_are_too_long_are_dropped_and_counted(settings_in: Make, judge: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 13)
    objective = {"kind": "grpo", "rewards": [{"function": f"{judge}:small"}], **SHORT}

    def rows_for(length: int) -> Any:
        data = {"path": str(tmp_path / "rows.jsonl"), "max_length": length, "eval_path": None, "eval_fraction": 0}
        return Grpo.read(settings_in(tmp_path / "run", objective=objective, data=data), prepared.base.tokenizer)

    prepared = prepare(settings_in(tmp_path / "other", objective=objective))
    report = rows_for(40).train.report
    assert (report.rows + report.dropped, report.dropped > 0) == (13, True)
    with pytest.raises(DataError, match="All 13 prompts are longer than max_length=9"):
        rows_for(9)
