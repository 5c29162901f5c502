"""Preference objectives against TRL's own trainers: the same rows, the same adapter on the same base; loss, rewards, gradients.

What runs on the other side is TRL's trainer, made as its users make it and asked for the loss of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from tests.parity.cases import relative
from tests.preference_rows import marked, pairs, write
from tests.tiny_run import save_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from luthier.data.batches import collate
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.engine.reward_model import RewardModel
from luthier.formats.keys import item_key
from luthier.train.loop import Trainer
from luthier.train.objectives.base import MicroBatch
from luthier.train.objectives.kto import mismatched
from luthier.train.prepare import prepare
from luthier.train.run import train
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

# What TRL, PEFT and transformers say about each other is not what is tested.
pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOLERANCE = 1e-5
PAD = 2
"""The padding of the tiny model, which is its stop token too, as in many a real one."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("trl")
    save_tiny_model(home / "model", tiny_llama, tiny_tokenizer, hidden=32, layers=2)
    write(home / "pairs.jsonl", [row | {"margin": 0.25 * index} for index, row in enumerate(pairs(5))])
    write(home / "marked.jsonl", marked(6))
    return home


@dataclass
class Ours:
    """A run of ours that has not begun, its adapter at random numbers, and its first micro-batch: all rows."""

    trainer: Trainer
    batch: MicroBatch

    @property
    def adapter(self) -> dict[str, Tensor]:
        return {item_key(item): item.parameter.detach() for item in self.trainer.items}

    def result(self, batch: MicroBatch | None = None) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        """Return the mean loss, the mean figures and the gradients by name on disk."""
        batch = batch or self.batch
        self.trainer.model.train()
        loss, figures = self.trainer.objective.loss(batch)
        (loss / batch.weight).backward()
        gradients = {item_key(item): item.parameter.grad for item in self.trainer.items}
        return float(loss.detach()) / batch.weight, {name: value / batch.weight for name, value in figures.items()}, gradients  # type: ignore[return-value]


@pytest.fixture
def ours(folder: Path, tmp_path: Path) -> Callable[..., Ours]:
    def make(objective: dict[str, Any], rows: str = "pairs.jsonl") -> Ours:
        settings = RunSettings(
            model=str(folder / "model"),
            out=str(tmp_path / "run"),
            dtype="float32",
            objective=objective,
            data={"path": str(folder / rows), "eval_fraction": 0},
            lora={"r": 4, "lora_alpha": 8, "target_modules": TARGETS},
            train={"batch_tokens": 99_999},
        )
        trainer = Trainer(prepare(settings), RunFolder.create(settings))
        torch.manual_seed(3)
        with torch.no_grad():
            for item in trainer.items:
                item.parameter.add_(0.1 * torch.randn_like(item.parameter))
        indices = range(len(trainer.prepared.rows.item_lengths))
        return Ours(trainer, trainer.objective.step_batches(0, [list(indices)])[0])

    return make


def theirs(folder: Path, adapter: dict[str, Tensor], trainer: Any, config: Any, task: str = "CAUSAL_LM", rows: Any = None) -> Any:
    """Return one of TRL's trainers on the same base with the same adapter."""
    kind, more = AutoModelForCausalLM, {}
    if task == "SEQ_CLS":
        kind, more = AutoModelForSequenceClassification, {"num_labels": 1}
    model = kind.from_pretrained(folder / "model", dtype=torch.float32, **more)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type=task)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    data = Dataset.from_list(rows or [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs(5)])
    made = trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    found = peft.set_peft_model_state_dict(made.model, adapter)
    assert not found.unexpected_keys
    made.model.train()
    return made


def gradients_of(model: Any) -> dict[str, Tensor]:
    named = {name.replace(".default", "").replace(".modules_to_save", ""): value for name, value in model.named_parameters()}
    return {name: value.grad for name, value in named.items() if value.grad is not None}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(bool(each.any()) for each in wanted.values()), "a gradient that is zero would be compared with nothing"
    assert {name: error for name, each in found.items() if (error := relative(each, wanted[name])) > TOLERANCE} == {}


def as_inputs(rows: list[EncodedRow]) -> dict[str, Tensor]:
    """Return rows as TRL's collators give them."""
    batch = collate(rows, PAD, multiple_of=1)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "completion_mask": (batch.labels != UNLABELLED).long(),
    }


def chosen_first(rows: list[EncodedRow]) -> list[EncodedRow]:
    return rows[::2] + rows[1::2]


def settings_for(tmp_path: Path, **more: Any) -> dict[str, Any]:
    given = {"output_dir": str(tmp_path / "trl"), "report_to": "none", "bf16": False, "use_cpu": True}
    return given | {"per_device_train_batch_size": 8, "gradient_checkpointing": False} | more


@pytest.mark.parametrize(
    ("objective", "loss"),
    [
        ({"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ({"beta": 0.3, "loss": "ipo"}, {"loss_type": "ipo", "beta": 0.3}),
        ({"beta": 0.3, "loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "beta": 0.3, "label_smoothing": 0.1}),
    ],
    ids=["sigmoid", "ipo", "robust"],
)
def test_dpo(objective: dict, loss: dict, ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    mine = ours({"kind": "dpo"} | objective)
    found, figures, gradients = mine.result()
    other = theirs(folder, mine.adapter, DPOTrainer, DPOConfig(**settings_for(tmp_path, **loss)))
    wanted = other._compute_loss(other.model, as_inputs(chosen_first(mine.batch.data.rows)), False)
    wanted.backward()
    told = {name: values[-1] for name, values in other._metrics["train"].items()}
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert figures["rewards/chosen"] == pytest.approx(told["rewards/chosen"], abs=TOLERANCE)
    assert figures["rewards/rejected"] == pytest.approx(told["rewards/rejected"], abs=TOLERANCE)
    assert figures["rewards/margin"] == pytest.approx(told["rewards/margins"], abs=TOLERANCE)
    assert figures["rewards/accuracy"] == pytest.approx(told["rewards/accuracies"])
    assert abs(told["rewards/chosen"]) > 0.01, "rewards near nothing would compare nothing"
    assert_same(gradients, gradients_of(other.model))


def test_dpo_with_label_smoothing(ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    """TRL 1.16 has it in the loss `aot`, which for a single pair is DPO's."""
    from trl import DPOConfig, DPOTrainer

    mine = ours({"kind": "dpo", "beta": 0.3, "label_smoothing": 0.2})
    one = mine.trainer.objective.micro_batch([2])
    found, _, gradients = mine.result(one)
    loss = {"loss_type": "aot", "beta": 0.3, "label_smoothing": 0.2}
    other = theirs(folder, mine.adapter, DPOTrainer, DPOConfig(**settings_for(tmp_path, **loss)))
    wanted = other._compute_loss(other.model, as_inputs(one.data.rows), False)
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert_same(gradients, gradients_of(other.model))


@pytest.mark.parametrize("weights", [{}, {"desirable_weight": 1.3, "undesirable_weight": 0.6}], ids=["even", "weighted"])
def test_kto(weights: dict[str, float], ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    mine = ours({"kind": "kto", "beta": 0.4} | weights, "marked.jsonl")
    found, figures, gradients = mine.result()
    config = KTOConfig(**settings_for(tmp_path, beta=0.4, **weights))
    other = theirs(folder, mine.adapter, KTOTrainer, config, rows=marked(6))
    given, rows = mine.batch.data, mine.batch.data.answers.rows
    crossed = as_inputs(mismatched(rows, 999))
    inputs = as_inputs(rows) | {f"KL_{name}": value for name, value in crossed.items()}
    wanted = other._compute_loss(other.model, inputs | {"label": torch.tensor(given.marks)}, False)
    wanted.backward()
    told = {name: values[-1] for name, values in other._metrics["train"].items()}
    assert float(given.kl) == pytest.approx(told["kl"], rel=1e-4)
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert figures["rewards/good"] == pytest.approx(told["rewards/chosen"], abs=TOLERANCE)
    assert figures["rewards/bad"] == pytest.approx(told["rewards/rejected"], abs=TOLERANCE)
    assert_same(gradients, gradients_of(other.model))


def paired(rows: list[EncodedRow]) -> dict[str, Tensor]:
    """Return pairs as TRL's older collator gives them."""
    found = {}
    for side, part in (("chosen", rows[::2]), ("rejected", rows[1::2])):
        batch = collate(part, 0, multiple_of=1)
        found |= {f"{side}_input_ids": batch.input_ids, f"{side}_attention_mask": batch.attention_mask}
        found |= {f"{side}_labels": batch.labels}
    return found


def test_simpo(ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    mine = ours({"kind": "dpo", "loss": "simpo", "beta": 2.0, "gamma": 0.8})
    found, figures, gradients = mine.result()
    config = CPOConfig(**settings_for(tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.8, cpo_alpha=0.0))
    other = theirs(folder, mine.adapter, CPOTrainer, config)
    wanted, told = other.get_batch_loss_metrics(other.model, paired(mine.batch.data.rows))
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert figures["rewards/chosen"] == pytest.approx(told["rewards/chosen"], abs=TOLERANCE)
    assert figures["rewards/rejected"] == pytest.approx(told["rewards/rejected"], abs=TOLERANCE)
    assert_same(gradients, gradients_of(other.model))


def test_orpo(ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    """TRL's likelihood term is a mean over all tokens of the batch, questions too; questions of one token and answers of one
    length make it ours."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    mine = ours({"kind": "dpo", "loss": "orpo", "beta": 0.4})
    generator = torch.Generator().manual_seed(1)
    vocabulary = mine.trainer.model.config.vocab_size
    ids = torch.randint(3, vocabulary, (8, 7), generator=generator).tolist()
    rows = [EncodedRow(index // 2, row, [UNLABELLED, *row[1:]]) for index, row in enumerate(ids)]
    objective: Any = mine.trainer.objective
    found, figures, gradients = mine.result(
        MicroBatch(objective.answers([rows[at : at + 2] for at in range(0, 8, 2)]), 56, 48, 4)
    )
    other = theirs(folder, mine.adapter, ORPOTrainer, ORPOConfig(**settings_for(tmp_path, beta=0.4)))
    wanted, told = other.get_batch_loss_metrics(other.model, paired(rows))
    wanted.backward()
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert figures["rewards/chosen"] == pytest.approx(told["rewards/chosen"], abs=TOLERANCE)
    assert_same(gradients, gradients_of(other.model))


def test_reward(ours: Callable[..., Ours], folder: Path, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    mine = ours({"kind": "reward"})
    other = theirs(folder, mine.adapter, RewardTrainer, RewardConfig(**settings_for(tmp_path)), "SEQ_CLS")
    mine.trainer.model.double()  # differences of scores this near each other lose digits in float32, here and there
    other.model.double()
    other.model.config.pad_token_id = PAD  # the base's own, which TRL has replaced by the tokenizer's
    found, figures, gradients = mine.result()
    inputs = as_inputs(chosen_first(mine.batch.data.rows))
    del inputs["completion_mask"]
    wanted = other.compute_loss(other.model, inputs | {"margin": torch.tensor([0.25 * index for index in range(5)])})
    wanted.backward()
    told = {name: values[-1] for name, values in other._metrics["train"].items()}
    assert found == pytest.approx(wanted.item(), rel=TOLERANCE)
    assert figures["rewards/accuracy"] == pytest.approx(told["accuracy"])
    assert figures["rewards/margin"] == pytest.approx(told["margin"], rel=1e-4)
    assert_same(gradients, gradients_of(other.model))


def test_a_reward_model_gives_the_same_scores_through_peft(folder: Path, tmp_path: Path) -> None:
    settings = RunSettings(
        model=str(folder / "model"),
        out=str(tmp_path / "run"),
        dtype="float32",
        objective={"kind": "reward"},
        data={"path": str(folder / "pairs.jsonl"), "eval_fraction": 0},
        lora={"r": 4},
        train={"learning_rate": 1e-2, "max_steps": 3},
    )
    adapter = train(settings).adapter
    reward = RewardModel.load(adapter, dtype="float32")
    rows = pairs(4)
    scores = reward([row["prompt"] for row in rows] * 2, [row["chosen"] for row in rows] + [row["rejected"] for row in rows])
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for score, row, side in zip(scores, rows * 2, ["chosen"] * 4 + ["rejected"] * 4, strict=True):
        said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        asked = tokenizer.apply_chat_template(said[:1], tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template(said, tokenize=False).rstrip("\n")
        parts = [asked, text.removeprefix(asked)]  # as when the model is asked: the answer's tokens are its own
        ids = torch.tensor([[token for part in parts for token in tokenizer(part, add_special_tokens=False).input_ids]])
        with torch.no_grad():
            wanted = model(input_ids=ids).logits.item()
        assert score == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert len({round(score, 4) for score in scores}) > 4
