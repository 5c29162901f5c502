"""Objective: what the loop asks of whatever a run minimises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from luthier.core.config import LoraConfig
from luthier.formats.folder import AdapterFolder
from luthier.train.schedule import plan_steps
from luthier.train.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.rows import Rows
    from luthier.train.schedule import Step
    from luthier.train.settings import RunSettings


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once. `weight` is what its loss is a sum over: answer tokens, pairs, sequences."""

    data: Any
    num_tokens: int
    labelled_tokens: int
    weight: float


class Objective(ABC):
    """The loss of a run, over items: rows, pairs of rows, or prompts to be answered.

    A step adds up `loss` over its micro-batches and divides by the sum of their weights, so how the items are spread over
    micro-batches changes nothing.
    """

    needs_reference: ClassVar[bool] = False
    """Whether the model as it was when the run began has a part in the loss."""

    world: World = World()
    """The processes of the run, as its Trainer knows them."""

    silences_base: ClassVar[bool] = False
    """Whether the base's own dropout is off from then on: `silence_dropout`."""
    changes_base: ClassVar[bool] = False
    """Whether `made_ready` puts something into the base, which other runs over the same one would find there."""

    def __init__(self, prepared: "Prepared"):
        self.prepared = prepared
        self.model = prepared.base.model

    @classmethod
    @abstractmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> "Rows":
        """Read and encode the rows of a run. Raises: DataError, ConfigError."""

    @classmethod
    def made_ready(cls, model: "PreTrainedModel", lora: LoraConfig, seed: int) -> LoraConfig:
        """Put into a base what the objective needs there, before adapters; return the configuration of the adapter with it."""
        return lora

    @classmethod
    def continued(cls, folder: AdapterFolder, model: "PreTrainedModel") -> AdapterFolder:
        """Return a stored adapter that is to be trained on, with what the objective needs of it and it may lack."""
        return folder

    @classmethod
    def planned(cls, lengths: Sequence[int], settings: "RunSettings", *, packed: bool) -> "list[tuple[int, Step]]":
        """Return (epoch, micro-batches) of every step; `lengths` are the items', in tokens."""
        return plan_steps(lengths, settings.train, packed=packed)

    @abstractmethod
    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return these items as one micro-batch, as they lie in the data."""

    @abstractmethod
    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        """Return the loss summed over the batch's weight (differentiable), and further figures, sums over it too."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Return figures over the held-out rows: "eval_loss", of which the lowest is the best, and others."""

    def step_batches(self, step: int, planned: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Return the micro-batches of a step (counted from 0). An objective that samples does so here."""
        return [self.micro_batch(indices) for indices in planned]

    def figures(self) -> dict[str, float]:
        """Return what else is told of the last step as a whole."""
        return {}

    @property
    def may_rest(self) -> bool:
        """Whether the last step may have had nothing to teach, so that gradients of zero are no fault."""
        return False

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Give back what is only needed while steps are made; it is made again where it is needed again."""

    def extra_parameters(self) -> dict[str, nn.Parameter]:
        """Return what is trained beside the adapter and is no part of it, by name. Its values are in `state`."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Return what an exact continuation needs beyond the adapter, the moments and the generators, by name."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:  # noqa: B027 - most have nothing to take up
        """Take up what `state` returned."""
