"""A reward model: a score for an answer, learnt from pairs (Bradley and Terry's model of choice).

The score is a product of the last token's hidden state with a head that is trained beside the adapter and saved in it
(`luthier.adapt.score_head`). `luthier.engine.reward_model` asks it for scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from torch import Tensor

from luthier.adapt.score_head import SCORE, add_score_head, scoring_config
from luthier.core.config import LoraConfig
from luthier.engine.reward_model import scores_of
from luthier.formats.folder import AdapterFolder
from luthier.formats.keys import whole_key
from luthier.train.objectives.base import MicroBatch
from luthier.train.objectives.losses import bradley_terry
from luthier.train.objectives.preferences import Answers, PairRows, PreferenceObjective, read_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.settings import RunSettings


class Reward(PreferenceObjective):
    """How surely the scores prefer the chosen answers, a mean over pairs; by at least the pair's margin where it has one."""

    needs_reference = False
    changes_base = True

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        self.rows = cast(PairRows, prepared.rows)

    @classmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> PairRows:
        return read_pairs(settings, tokenizer)

    @classmethod
    def made_ready(cls, model: "PreTrainedModel", lora: LoraConfig, seed: int) -> LoraConfig:
        add_score_head(model, seed=seed)
        return scoring_config(lora)

    @classmethod
    def continued(cls, folder: AdapterFolder, model: "PreTrainedModel") -> AdapterFolder:
        key = whole_key(SCORE, "weight")
        tensors = {key: model.get_parameter(f"{SCORE}.weight").detach().float()} | folder.tensors
        return replace(folder, config=scoring_config(folder.config), tensors=tensors)

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        answers: Answers = batch.data
        assert answers.indices is not None
        return self._loss(answers, self.rows.margins, answers.indices)

    def held_out_sums(self, places: Sequence[int]) -> dict[str, float]:
        answers = self.answers([self.held_out_items[place] for place in places])
        loss, figures = self._loss(answers, self.rows.held_out_margins, places)
        return {"loss": float(loss)} | figures

    def _loss(self, answers: Answers, margins: Sequence[float] | None, places: Sequence[int]) -> tuple[Tensor, dict[str, float]]:
        scores = scores_of(self.model, answers.batch)
        chosen, rejected = scores[::2], scores[1::2]
        wanted = None if margins is None else scores.new_tensor([margins[place] for place in places])
        figures = {
            "rewards/chosen": float(chosen.detach().sum()),
            "rewards/rejected": float(rejected.detach().sum()),
            "rewards/margin": float((chosen - rejected).detach().sum()),
            "rewards/accuracy": float((chosen > rejected).sum()),
        }
        return bradley_terry(chosen, rejected, wanted).sum(), figures
