"""AdaLoRA on real data and the real small model: it ends at its budget, is resumed bit for bit, and travels to PEFT."""

import warnings
from pathlib import Path

import pytest
import torch
from tests.conftest import SMOLLM2
from tests.unit.train.test_resume import crashed_run, outcome

from luthier.adapt.switching import disabled
from luthier.engine.score import held_out_loss
from luthier.formats.adapters import load_adapter
from luthier.models.load import load_model
from luthier.train.run import Outcome, resume, train
from luthier.train.settings import RunSettings

STEPS, INIT_R, TARGET_R = 12, 4, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]
BLOCKS = list(range(15, 30))  # the upper half: half the way back for a gradient
NUM_LAYERS = len(TARGETS) * len(BLOCKS)


def settings_of(folder: Path, out: str) -> RunSettings:
    """Return the settings of a short run on the rows in `folder`, whose last allocation is at step 9 of 12."""
    return RunSettings(
        model=SMOLLM2,
        out=str(folder / out),
        data={
            "path": str(folder / "train.jsonl"),
            "eval_path": str(folder / "held-out.jsonl"),
            "prompt": "{{ text }}",
            "completion": '{{ {"intent": intent, "slots": slots} | tojson }}',
            "system": "Reply with JSON: intent, slots.",
        },
        lora={
            "peft_type": "ADALORA",
            "target_modules": TARGETS,
            "layers_to_transform": BLOCKS,
            "init_r": INIT_R,
            "target_r": TARGET_R,
            "tinit": 2,
            "tfinal": 3,
            "deltaT": 2,
        },
        train={"max_steps": STEPS, "batch_rows": 3, "learning_rate": 3e-2, "eval_every": 6},
    )


@pytest.fixture(scope="module")
def rows(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with 36 rows to train on and 6 held out, of every intent."""
    folder = tmp_path_factory.mktemp("adalora")
    for name, source, count in (("train", "train", 36), ("held-out", "test", 6)):
        lines = (shared_data / f"snips_json_{source}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:: len(lines) // count][:count]))
    return folder


@pytest.fixture(scope="module")
def finished(smollm2: Path, rows: Path) -> Outcome:
    """Return what a run that nobody stopped left."""
    torch.set_num_threads(2)  # as in every test, but this comes before the first: bits depend on the number of threads
    return train(settings_of(rows, "whole"))


@pytest.mark.slow
def test_it_ends_at_its_budget_and_has_learnt_without_the_penalty(finished: Outcome) -> None:
    ranks = finished.summary["ranks"]
    assert len(ranks["layers"]) == NUM_LAYERS
    assert ranks["total"] == sum(ranks["layers"].values()) == TARGET_R * NUM_LAYERS
    # 0 is a rank like others. Were they 2 everywhere, no rank would have moved.
    assert set(ranks["layers"].values()) <= set(range(INIT_R + 1))
    assert len(set(ranks["layers"].values())) > 2
    prepared = finished.prepared
    assert prepared.rows.held_out is not None
    loss = held_out_loss(prepared.base.model, prepared.rows.held_out.rows, prepared.pad_id).loss
    with disabled(prepared.base.model):
        base = held_out_loss(prepared.base.model, prepared.rows.held_out.rows, prepared.pad_id).loss
    assert finished.summary["best_eval_loss"] == pytest.approx(loss, rel=1e-2)  # the run's model was fused, this one is not
    assert loss < 0.7 * base


@pytest.mark.slow
def test_a_run_stopped_between_two_allocations_ends_with_the_same_bits(finished: Outcome, rows: Path) -> None:
    cut = crashed_run(settings_of(rows, "cut"), 8)  # allocations at 4, 6, 8, 9; the last checkpoint is of step 6
    torch.manual_seed(99)
    resume(cut)
    assert outcome(cut) == outcome(Path(finished.summary["run"]))


@pytest.mark.slow
def test_the_adapter_gives_the_same_logits_in_ours_and_in_peft(finished: Outcome, smollm2: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([finished.prepared.rows.train.rows[0].input_ids])
    trained = finished.prepared.base.model
    with torch.no_grad():
        again = load_model(SMOLLM2, dtype=finished.prepared.settings.dtype).model
        load_adapter(again, finished.adapter)
        assert torch.equal(again(ids).logits, trained(ids).logits)
        # In float32, where roundings of the base do not hide what differs.
        ours = load_model(SMOLLM2, dtype="float32").model
        load_adapter(ours, finished.adapter)
        expected = ours(ids).logits
        base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
        before = base(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT says about its own adapters is not what is tested
            theirs = PeftModel.from_pretrained(base, finished.adapter).eval()
        found = theirs(ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 0.1 * expected.abs().max(), "nothing was learnt: nothing was compared"
