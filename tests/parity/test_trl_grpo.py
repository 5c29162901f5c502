"""GRPO against TRL's own trainer: it samples, judges and takes its loss; ours is given the same answers.

Both sides ask old policy and reference when the answers are given; then the adapter moves, the same way on both, so that ratios
are not 1 and some of them are clipped.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tests.parity.cases import relative
from tests.tiny_run import save_tiny_model, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.formats.keys import item_key
from luthier.train.loop import Trainer
from luthier.train.objectives.grpo import Grpo
from luthier.train.prepare import prepare
from luthier.train.rewards import Answered
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

# What TRL, PEFT and transformers say about each other is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
TOLERANCE = 1e-5
GROUP, ROOM, TEMPERATURE = 4, 9, 0.8
CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss": "dapo"},
    "bnpo": {"loss": "bnpo", "scale_rewards": "none"},
    "grpo with a reference": {"loss": "grpo", "beta": 0.3},
    "k3 as it is": {"loss": "dapo", "beta": 0.3, "unbiased_kl": False},
    "dr_grpo, clipped higher upwards": {"loss": "dr_grpo", "scale_rewards": "batch", "epsilon": 0.05, "epsilon_high": 0.1},
    "dapo with all of it": {"loss": "dapo", "scale_rewards": "batch", "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.3},
}


def score(completion: str) -> float:
    """A reward that differs from answer to answer."""
    return (sum(completion.encode()) % 11) / 4 - 1


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("grpo")
    save_tiny_model(home / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=2)
    write_rows(home / "rows.jsonl", 3)
    (home / "reward.py").write_text("def score(prompt, completion, row):\n    return (sum(completion.encode()) % 11) / 4 - 1\n")
    return home


def ours(folder: Path, out: Path, case: dict[str, Any]) -> Trainer:
    objective = {"kind": "grpo", "num_generations": GROUP, "max_new_tokens": ROOM, "temperature": TEMPERATURE, "iterations": 2}
    settings = RunSettings(
        model=str(folder / "model"),
        out=str(out / "run"),
        dtype="float32",
        objective=objective | {"rewards": [{"function": f"{folder / 'reward.py'}:score"}]} | case,
        data={"path": str(folder / "rows.jsonl"), "eval_fraction": 0},
        lora={"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
        train={"batch_tokens": 99_999},
    )
    trainer = Trainer(prepare(settings), RunFolder.create(settings))
    move(dict(adapter_of(trainer)), seed=3)
    return trainer


def adapter_of(trainer: Trainer) -> dict[str, Tensor]:
    return {item_key(item): item.parameter for item in trainer.items}


def theirs(folder: Path, out: Path, case: dict[str, Any], adapter: dict[str, Tensor]) -> GRPOTrainer:
    """Return TRL's trainer on the same base with the same adapter."""
    words = {"loss": "loss_type", "unbiased_kl": "use_bias_correction_kl"}
    case = {words.get(key, key): value for key, value in case.items()}
    config = GRPOConfig(
        output_dir=str(out / "trl"),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3 * GROUP,
        num_generations=GROUP,
        max_completion_length=ROOM,
        temperature=TEMPERATURE,
        top_k=0,
        num_iterations=2,
        **case,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [score(each[0]["content"]) for each in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": each}]} for each in ("a", "b", "c")]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    found = peft.set_peft_model_state_dict(trainer.model, {name: value.detach() for name, value in adapter.items()})
    assert not found.unexpected_keys
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # what its training loop sets before a step
    return trainer


def move(parameters: dict[str, Tensor], *, seed: int) -> None:
    """Add the same noise to parameters of the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", CASES)
def test_grpo_is_trls(name: str, folder: Path, tmp_path: Path) -> None:
    case = CASES[name]
    trainer = ours(folder, tmp_path, case)
    objective = trainer.objective
    assert isinstance(objective, Grpo)
    peer = theirs(folder, tmp_path, case, adapter_of(trainer))

    prompts = [prompt.messages for prompt in objective.rows.prompts]
    torch.manual_seed(0)
    given = peer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts for _ in range(GROUP)])
    rows = []
    for place, kept in enumerate(given["completion_mask"].bool()):
        prompt = given["prompt_ids"][place][given["prompt_mask"][place].bool()].tolist()
        answer = given["completion_ids"][place][kept].tolist()
        assert prompt == objective.rows.train.rows[place // GROUP].input_ids[:-1], "the prompts are not the same tokens"
        rows.append(EncodedRow(place // GROUP, prompt + answer, [UNLABELLED] * len(prompt) + answer))
    assert len({len(row) for row in rows}) > 1, "answers of one length would hide what is divided by what"
    decode = peer.processing_class.decode
    texts = [decode([label for label in row.labels if label >= 0], skip_special_tokens=True) for row in rows]
    rewards = torch.tensor(objective.rewards([Answered([], text, {}) for text in texts]))[:, 0]
    rollout = objective.asked(replace(objective._blank(rows), start=0, rewards=rewards))

    first_tokens = torch.tensor([0, *rollout.lengths[:-1]]).cumsum(0)
    assert relative(rollout.advantages[first_tokens], given["advantages"]) < TOLERANCE
    kept = given["completion_mask"].bool()
    assert relative(rollout.old, given["old_per_token_logps"][kept]) < TOLERANCE
    if case.get("beta"):
        assert relative(rollout.reference, given["ref_per_token_logps"][kept]) < TOLERANCE

    named = {name.replace(".default", ""): each for name, each in peer.model.named_parameters() if each.requires_grad}
    move(adapter_of(trainer), seed=5)
    move(named, seed=5)
    wanted = peer._compute_loss(peer.model, given)
    wanted.backward()
    objective.rollout = rollout
    batches = objective.step_batches(0, [])
    total = sum(batch.weight for batch in batches)
    losses = [objective.loss(batch)[0] / total for batch in batches]
    sum(losses).backward()

    assert float(sum(losses)) == pytest.approx(float(wanted), rel=TOLERANCE, abs=1e-7)
    assert 0 < objective.tally["clipped"] < sum(rollout.lengths), "a loss without clipped tokens would leave clipping untested"
    found = adapter_of(trainer)
    assert found.keys() == named.keys()
    assert all(bool(each.grad.any()) for each in named.values()), "a gradient that is zero would be compared with nothing"
    errors = {name: relative(parameter.grad, named[name].grad) for name, parameter in found.items()}
    assert {name: error for name, error in errors.items() if error > TOLERANCE} == {}
