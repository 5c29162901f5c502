"""What objectives over the model's own answers share: a rollout is sampled, judged, and kept for some steps.

    step 0             sample answers to the step's prompts, judge them, ask old policy and reference about each token
    step 0, 1, ...     `iterations` optimiser steps over those answers, in micro-batches of like length
    next step          sample anew

An answer follows from (seed, step, row, number within its group), and a rollout that is still in use is kept in checkpoints, so
a run that is resumed sees the same answers.

Shape letters: S answers of a rollout, K tokens of all of them, F sources of reward.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from luthier.core.errors import CheckpointError, ConfigError
from luthier.data.batches import Batch, PackedBatch, collate, pack
from luthier.data.encode import UNLABELLED, EncodedRow
from luthier.data.prompts import Prompt
from luthier.engine.batches import batches_by_length
from luthier.engine.modes import evaluating
from luthier.engine.score import answer_log_probs, can_take_packed
from luthier.train.objectives.base import MicroBatch, Objective
from luthier.train.objectives.policy_losses import is_without_variance
from luthier.train.objectives.preferences import silence_dropout, tokens_of
from luthier.train.objectives.prompts import PromptRows, read_prompts
from luthier.train.objectives.samplers import Answer, Sampler, sampler_for
from luthier.train.objectives.settings import RolloutSettings
from luthier.train.reference import reference
from luthier.train.rewards import Answered, Rewards
from luthier.train.schedule import Step, plan_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from luthier.train.prepare import Prepared
    from luthier.train.settings import RunSettings

log = logging.getLogger(__name__)

EQUAL_STEPS = 10
"""After so many rollouts in which every group had one reward, the user is told."""


@dataclass(frozen=True)
class Rollout:
    """Answers of the model as it was at step `start`, and what was found out about them then. Tensors stand on the CPU.

    `rows` are prompts with their answers, `scores` (S, F) and `rewards` (S,) what they were worth. Of each token, (K,):
    `advantages`, and where they are needed `old` and `reference` log-probabilities, `values` and `returns`.
    """

    start: int
    rows: list[EncodedRow]
    scores: Tensor
    rewards: Tensor
    is_cut: Tensor
    advantages: Tensor
    old: Tensor | None = None
    reference: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    seconds: float = 0.0

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer."""
        return tokens_of(self.rows)

    def part(self, places: Sequence[int]) -> "Rollout":
        """Return the answers at these places, in this order."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        starts = [0, *ends]
        index = torch.tensor([token for place in places for token in range(starts[place], ends[place])], dtype=torch.int64)
        chosen = torch.tensor(list(places), dtype=torch.int64)
        changes: dict[str, Any] = {name: None if (found := getattr(self, name)) is None else found[index] for name in PER_TOKEN}
        changes |= {name: getattr(self, name)[chosen] for name in PER_ANSWER}
        return replace(self, rows=[self.rows[place] for place in places], **changes)


PER_TOKEN = ("advantages", "old", "reference", "values", "returns")
PER_ANSWER = ("scores", "rewards", "is_cut")


class RolloutObjective(Objective):
    """An objective over answers of the model itself. What an answer's tokens are worth is the subclass's business."""

    silences_base = True

    def __init__(self, prepared: "Prepared"):
        super().__init__(prepared)
        silence_dropout(self.model)
        self.settings = cast(RolloutSettings, prepared.settings.objective)
        self.rows = cast(PromptRows, prepared.rows)
        self.rewards = Rewards(self.settings.rewards)
        self.sampler: Sampler | None = None
        self.rollout: Rollout | None = None
        self.used = 0
        """Steps that were made with the rollout."""
        self.equal_for = 0
        self.tally: dict[str, float] = {}

    @classmethod
    def read(cls, settings: "RunSettings", tokenizer: "PreTrainedTokenizerBase") -> PromptRows:
        return read_prompts(settings, tokenizer)

    @classmethod
    def planned(cls, lengths: Sequence[int], settings: "RunSettings", *, packed: bool) -> list[tuple[int, Step]]:
        """Return steps of `objective.prompts` prompts, each as often as its answers are used."""
        objective = settings.objective
        assert isinstance(objective, RolloutSettings)
        # One prompt a micro-batch, so that processes share a step by prompts; what goes through the model together comes later.
        train = settings.train.changed(batch_rows=1, accumulate=objective.prompts, max_steps=None)
        steps = [step for step in plan_steps(lengths, train) for _ in range(objective.iterations)]
        return steps[: settings.train.max_steps]

    # --- what a subclass says -------------------------------------------------------------------------------------

    def asked(self, rollout: Rollout) -> Rollout:
        """Return the rollout with what has to be asked of the models now, and with the advantages of its tokens."""
        raise NotImplementedError

    def token_loss(self, part: Rollout) -> Tensor:
        """Return the loss of these answers, a sum over `weight_of` them; figures go into `tally`."""
        raise NotImplementedError

    def weight_of(self, lengths: Sequence[int]) -> float:
        """Return what the loss of answers of these lengths is a sum over."""
        return sum(lengths)

    def idle(self, rollout: Rollout) -> list[bool]:
        """Return for each answer whether it can be left out, since neither loss nor gradient would change."""
        return [False] * len(rollout.rows)

    # --- a step ---------------------------------------------------------------------------------------------------

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Return longest answers to these prompts, worth nothing: what memory and time are reckoned by."""
        rows = [row for index in indices for row in self.rows.item(index)]
        return self._batch(self._blank(rows))

    def step_batches(self, step: int, planned: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Sample where it is time to, and return the answers in micro-batches, those that teach nothing left out."""
        start = step - step % self.settings.iterations
        if self.rollout is None or self.rollout.start != start:
            if step != start:
                raise CheckpointError(
                    f"the answers step {step + 1} goes on with were given at step {start + 1}, and the checkpoint lacks them; "
                    "start a new run"
                )
            if self.world.size > 1 and self.settings.iterations > 1:
                raise ConfigError("objective.iterations above 1 needs one process: a checkpoint holds the answers of one only")
            self.rollout = self._roll_out(start, [index for indices in planned for index in indices])
        self.used = step - start + 1
        self.tally = {}
        rollout = self.rollout
        idle = self.idle(rollout)
        taught = [place for place, is_idle in enumerate(idle) if not is_idle]
        # Where nothing teaches, one answer stays: gradients of zero are gradients, and the optimiser's moments fade.
        places = taught or list(range(min(1, len(rollout.rows))))
        lengths = [len(rollout.rows[place]) for place in places]
        train = self.prepared.settings.train
        together = batches_by_length(lengths, max_tokens=train.batch_tokens, max_rows=train.batch_rows)
        batches = [self._batch(rollout.part([places[each] for each in batch])) for batch in together]
        if batches:
            left_out = self.weight_of(rollout.lengths) - sum(batch.weight for batch in batches)
            batches[0] = replace(batches[0], weight=batches[0].weight + left_out)
        return batches

    def loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        return self.token_loss(batch.data), {}

    @property
    def may_rest(self) -> bool:
        return self.rollout is None or not bool(self.rollout.advantages.any())

    def figures(self) -> dict[str, float]:
        """Return reward first, then what it is made of, the share of groups without variance, and the answers' lengths."""
        rollout = self.rollout
        assert rollout is not None
        group = self.settings.num_generations
        equal = is_without_variance(rollout.rewards, group) if group > 1 else torch.zeros(0)
        sums = {
            "answers": float(len(rollout.rows)),
            "tokens": float(sum(rollout.lengths)),
            "reward": float(rollout.rewards.sum()),
            "squares": float((rollout.rewards**2).sum()),
            "equal": float(equal.sum()),
            "groups": float(len(equal)),
            "cut": float(rollout.is_cut.sum()),
        }
        sums |= {f"reward/{name}": float(each) for name, each in zip(self.rewards.names, rollout.scores.sum(dim=0), strict=True)}
        sums |= {name: self.tally.get(name, 0.0) for name in self.tally_names()}
        all_of = dict(zip(sums, self.world.sum(list(sums.values())), strict=True))
        answers, tokens, groups = all_of["answers"], all_of["tokens"], all_of["groups"]
        mean = all_of["reward"] / answers
        found = {"reward": mean, "reward_std": max(0.0, all_of["squares"] / answers - mean**2) ** 0.5}
        if len(self.rewards.names) > 1:
            found |= {name: value / answers for name, value in all_of.items() if name.startswith("reward/")}
        if groups:
            found["zero_variance"] = all_of["equal"] / groups
        found |= {"answer_tokens": tokens / answers, "cut_off": all_of["cut"] / answers}
        found |= {name: all_of[name] / tokens for name in self.tally_names()}
        found["sampling_seconds"] = rollout.seconds if self.used == 1 else 0.0
        if self.used == 1:
            self._watch(all_equal=bool(groups) and all_of["equal"] == groups)
        return found

    def tally_names(self) -> Sequence[str]:
        """Return the names in `tally`: figures that are means over tokens."""
        return ()

    def count(self, **values: Tensor | None) -> None:
        """Add sums over tokens to the tally of the step."""
        for name, value in values.items():
            if value is not None:
                self.tally[name] = self.tally.get(name, 0.0) + float(value.detach().sum())

    def _watch(self, *, all_equal: bool) -> None:
        self.equal_for = self.equal_for + 1 if all_equal else 0
        if self.equal_for == EQUAL_STEPS:
            log.warning(
                f"in the last {EQUAL_STEPS} samplings all answers to a prompt had the same reward, which teaches nothing. "
                "Is the task too easy or too hard, or the temperature too low? A reward that tells degrees apart helps."
            )

    # --- sampling -------------------------------------------------------------------------------------------------

    def _roll_out(self, start: int, items: Sequence[int]) -> Rollout:
        """Sample and judge answers to these prompts, groups side by side."""
        began = time.perf_counter()
        group = self.settings.num_generations
        items = [index for index in items for _ in range(group)]
        prompts = [self.rows.train.rows[index].input_ids[:-1] for index in items]
        run_seed = self.prepared.settings.train.seed
        seeds = [seed_of(run_seed, start, index, place % group) for place, index in enumerate(items)]
        answers = self._answers(prompts, seeds)
        scores = self._judged([self.rows.prompts[index] for index in items], answers)
        rows = [
            EncodedRow(self.rows.train.rows[index].row, [*prompt, *answer.token_ids], _labels(prompt, answer))
            for index, prompt, answer in zip(items, prompts, answers, strict=True)
        ]
        blank = replace(
            self._blank(rows),
            start=start,
            scores=scores,
            rewards=torch.tensor([self.rewards.total(each) for each in scores.tolist()]),
            is_cut=torch.tensor([answer.is_cut for answer in answers], dtype=torch.bool),
        )
        seconds = time.perf_counter() - began
        return replace(self.asked(blank), seconds=seconds)

    def _answers(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Answer]:
        if self.sampler is None:
            self.sampler = sampler_for(self.prepared, self.settings)
        return self.sampler.answer(prompts, seeds) if prompts else []

    def _judged(self, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Tensor:
        judged = [Answered(prompt.messages, answer.text, prompt.row) for prompt, answer in zip(prompts, answers, strict=True)]
        return torch.tensor(self.rewards(judged), dtype=torch.float32).reshape(len(judged), len(self.rewards.names))

    def _blank(self, rows: list[EncodedRow]) -> Rollout:
        zeros = torch.zeros(len(rows))
        tokens = torch.zeros(sum(tokens_of(rows)))
        return Rollout(-1, rows, zeros[:, None].expand(-1, len(self.rewards.names)), zeros, zeros.bool(), tokens)

    # --- asking models --------------------------------------------------------------------------------------------

    def batch_of(self, rows: Sequence[EncodedRow]) -> Batch | PackedBatch:
        """Return rows as one batch, packed or padded as the run has it."""
        packs = self.prepared.packed and can_take_packed(self.model, rows)
        return pack(rows) if packs else collate(rows, self.prepared.pad_id)

    def log_probs(self, rows: Sequence[EncodedRow]) -> Tensor:
        """Return the log-probability of each token of these answers, in their order: (K,)."""
        found, rows_K = answer_log_probs(self.model, self.batch_of(rows), temperature=self.settings.temperature)
        return found[rows_K.argsort(stable=True)]

    def asked_of_policy(self, rollout: Rollout) -> Tensor:
        """Return the log-probabilities of all tokens under the model as it is now, without gradients: (K,)."""
        return self._asked_in_batches(rollout)

    def asked_of_reference(self, rollout: Rollout) -> Tensor:
        """Return those under the model as it was when the run began."""
        with reference(self.model, self.prepared.frozen):
            return self._asked_in_batches(rollout)

    def _asked_in_batches(self, rollout: Rollout) -> Tensor:
        if not rollout.rows:  # a process that has no prompt in a run's last step
            return torch.zeros(0)
        return self.in_batches(rollout, lambda rows: (self.log_probs(rows),))[0]

    def in_batches(self, rollout: Rollout, ask: Any) -> list[Tensor]:
        """Return what `ask` says of the tokens of all answers, in their order; it gives tensors over those of some rows."""
        train = self.prepared.settings.train
        lengths = rollout.lengths
        pieces: dict[int, tuple[Tensor, ...]] = {}
        with evaluating(self.model):
            together = batches_by_length(
                [len(row) for row in rollout.rows], max_tokens=train.batch_tokens, max_rows=train.batch_rows
            )
            for places in together:
                found = [
                    each.cpu().split([lengths[place] for place in places]) for each in ask([rollout.rows[p] for p in places])
                ]
                pieces.update(zip(places, zip(*found, strict=True), strict=True))
        ordered = [pieces[place] for place in range(len(rollout.rows))]
        return [torch.cat(each) for each in zip(*ordered, strict=True)]

    def _batch(self, part: Rollout) -> MicroBatch:
        lengths = part.lengths
        return MicroBatch(part, sum(len(row) for row in part.rows), sum(lengths), self.weight_of(lengths))

    # --- held-out prompts -------------------------------------------------------------------------------------------

    def held_out_scores(self) -> Tensor:
        """Return the reward of the likeliest answer to each held-out prompt, by each source: (prompts, F)."""
        assert self.rows.held_out is not None
        prompts = [row.input_ids[:-1] for row in self.rows.held_out.rows]
        return self._judged(self.rows.held_out_prompts, self._answers(prompts, None))

    def evaluate(self) -> dict[str, float]:
        """Return the mean reward of greedy answers; "eval_loss" is minus that, since the lowest is the best."""
        scores = self.held_out_scores()
        rewards = [self.rewards.total(each) for each in scores.tolist()]
        mean = sum(rewards) / len(rewards)
        found = {"eval_loss": 0.0 - mean, "eval_reward": mean}
        if len(self.rewards.names) > 1:
            found |= {
                f"eval_reward/{name}": float(each) for name, each in zip(self.rewards.names, scores.mean(dim=0), strict=True)
            }
        return found

    # --- the life of the objective ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return the rollout, where steps are still to be made with it."""
        rollout = self.rollout
        if rollout is None or self.used >= self.settings.iterations:
            return {}
        prompts = [len(row) - length for row, length in zip(rollout.rows, rollout.lengths, strict=True)]
        found = {
            "rollout.start": torch.tensor(rollout.start),
            "rollout.ids": torch.tensor([token for row in rollout.rows for token in row.input_ids]),
            "rollout.shapes": torch.tensor([[r.row, p, len(r) - p] for r, p in zip(rollout.rows, prompts, strict=True)]),
        }
        tensors = {name: getattr(rollout, name) for name in (*PER_ANSWER, *PER_TOKEN)}
        return found | {f"rollout.{name}": tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}

    def restore(self, state: dict[str, Tensor]) -> None:
        if "rollout.start" not in state:
            return
        ids = iter(state["rollout.ids"].tolist())
        rows = []
        for row, asked, said in state["rollout.shapes"].tolist():
            prompt, answer = [next(ids) for _ in range(asked)], [next(ids) for _ in range(said)]
            rows.append(EncodedRow(row, prompt + answer, [UNLABELLED] * asked + answer))
        known = {each.name for each in fields(Rollout)}
        prefix = "rollout."
        tensors = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        tensors = {name: value for name, value in tensors.items() if name in known and name != "start"}
        self.rollout = Rollout(start=int(state["rollout.start"]), rows=rows, **tensors)  # type: ignore[arg-type]

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()
            self.sampler = None


def seed_of(seed: int, step: int, row: int, number: int) -> int:
    """Return the seed of one answer: the run's, the step's (from 0), the prompt's and its number in the group, mixed."""
    raw = hashlib.sha256(f"luthier rollout, seed {seed}, step {step}, row {row}, answer {number}".encode()).digest()
    return int.from_bytes(raw[:8], "big") >> 1


def _labels(prompt: Sequence[int], answer: Answer) -> list[int]:
    return [UNLABELLED] * len(prompt) + list(answer.token_ids)
