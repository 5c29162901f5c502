"""KTO's divergence: estimated on questions with other questions' answers, over the whole step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.preference_rows import marked, pairs, write

from luthier.adapt.switching import disabled
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.train.loop import Trainer
from luthier.train.objectives.kto import Kto, mismatched
from luthier.train.prepare import prepare
from luthier.train.runfolder import RunFolder
from luthier.train.settings import RunSettings

Make = Callable[..., RunSettings]


def test_each_question_gets_the_answer_before_it() -> None:
    rows = [
        EncodedRow(0, [1, 2, 3, 4], [UNLABELLED, UNLABELLED, 3, 4]),
        EncodedRow(5, [5, 6, 7], [UNLABELLED, 6, 7]),
        EncodedRow(9, [8, 9, 10, 11, 12], [UNLABELLED, UNLABELLED, UNLABELLED, 11, 12]),
    ]
    found = mismatched(rows, 4)
    assert [row.input_ids for row in found] == [[1, 2, 11, 12], [5, 3, 4], [8, 9, 10, 6]]  # the last is cut to four
    assert [row.labels[-1] for row in found] == [12, 4, 6]
    assert [row.labels.index(row.labels[-1]) for row in found] == [3, 2, 3]
    assert mismatched(rows[:1], 4) == []


@pytest.fixture
def trainer_of(settings_in: Make, tmp_path: Path) -> Callable[..., Trainer]:
    def make(rows: list[dict[str, Any]], **sections: Any) -> Trainer:
        path = write(tmp_path / "rows.jsonl", rows)
        data = {"path": str(path), "eval_path": None, "eval_fraction": 0}
        settings = settings_in(tmp_path / "run", objective={"kind": "kto"}, data=data, **sections)
        trainer = Trainer(prepare(settings), RunFolder.create(settings))
        with torch.no_grad():
            for item in trainer.items:
                item.parameter.add_(0.1 * torch.randn_like(item.parameter))
        return trainer

    return make


def test_one_divergence_for_all_micro_batches_of_a_step(trainer_of: Callable[..., Trainer]) -> None:
    trainer = trainer_of(marked(8))
    objective = trainer.objective
    assert isinstance(objective, Kto)
    parts = objective.step_batches(0, [[0, 1, 2], [3, 4, 5, 6, 7]])
    kls = [float(part.data.kl) for part in parts]
    crossed = [objective.answers([[row] for row in mismatched(part.data.answers.rows, 999)]) for part in parts]
    ours = torch.cat([objective.log_probs(answers) for answers in crossed])
    with disabled(trainer.model):
        ratios = ours - torch.cat([objective.log_probs(answers) for answers in crossed])
    assert kls[0] == kls[1] == pytest.approx(max(0.0, float(ratios.mean().detach())), rel=1e-4, abs=1e-6)
    assert objective.figures() == {"kl": kls[0]}


def test_rows_that_cannot_be_crossed_are_told(trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    trainer_of(marked(4), train={"batch_rows": 1})
    assert "each micro-batch has one row" in caplog.text


def test_an_uneven_balance_is_told(trainer_of: Callable[..., Trainer], caplog: pytest.LogCaptureFixture) -> None:
    rows = marked(10)
    trainer_of([row for index, row in enumerate(rows) if row["label"] or index == 1])
    assert "good answers weigh 5 in all and bad ones 1" in caplog.text


def test_pairs_are_both_kinds_and_stay_on_one_side(settings_in: Make, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", pairs(10))
    data = {"path": str(path), "eval_path": None, "eval_fraction": 0.3}
    prepared = prepare(settings_in(tmp_path / "run", objective={"kind": "kto"}, data=data))
    rows: Any = prepared.rows
    assert len(rows.train.rows) == 14 and rows.marks == (True, False) * 7
    assert rows.held_out is not None and rows.held_out_marks == (True, False) * 3
    assert not {row.row for row in rows.train.rows} & {row.row for row in rows.held_out.rows}
