"""The Trainer: step, evaluate, checkpoint, until the plan is done. What, how, and what is not here:

A step adds up the loss of its micro-batches as a sum over answer tokens (or what else the objective weighs by), divided by their
number in the whole step: two batches of one row each count as one batch of two. Everything a step depends on (adapter, AdamW's
moments, the generators, the position in the plan) is in a checkpoint, so a killed run that is resumed ends with the same bits (on
as many threads and in as many processes as before; where the number differs, a warning says so).

Several processes (world.py) hold the same adapter to the bit, each does its share of a step's micro-batches, and the first one
writes all files.

Not here: which rows go together (schedule.py), the loss (objectives), files (runfolder.py), the screen (display.py).
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from luthier.adapt.fusing import fuse, fusion_of, unfuse
from luthier.adapt.ranks import RankAllocator, drop_masked
from luthier.adapt.state import adapter_parameters, base_parameters, pairs_with_start
from luthier.core.allocator import release_freed_memory
from luthier.core.config import AdaLoraConfig
from luthier.core.errors import CheckpointError, DivergedError, TrainingError
from luthier.formats.adapters import save_adapter
from luthier.formats.folder import read_adapter
from luthier.formats.keys import item_key
from luthier.formats.note import TENSOR_FILE
from luthier.ops.compiler import use_compiler
from luthier.ops.packed import stored_bytes
from luthier.ops.scratch import release_scratch
from luthier.train.groups import gradient_norms, parameter_groups
from luthier.train.memory import peak_memory, reset_peak_memory, settle_allocator
from luthier.train.objectives import objective_class
from luthier.train.objectives.base import MicroBatch
from luthier.train.prepare import Prepared
from luthier.train.records import EvalRecord, Observer, StepRecord, log_line
from luthier.train.runfolder import Progress, RunFolder, of_rank, random_state, restore_random_state, seed_of
from luthier.train.schedule import anchor_steps, learning_rate, plan_digest
from luthier.train.settings import LOOKING_ON
from luthier.train.world import World

if TYPE_CHECKING:
    from luthier.train.sharding import ShardedModel

log = logging.getLogger(__name__)

EVALUATIONS_PER_RUN = 10
TOKENS_WORTH_COMPILING = 200_000
"""Compiling takes 10 to 30 seconds where nothing is in the compiler's cache yet, and saves some percent of a step."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


class Trainer:
    """Trains the adapter of a prepared run in its folder. `run()` carries on from wherever the folder's last checkpoint is."""

    def __init__(self, prepared: Prepared, folder: RunFolder, observer: Observer | None = None, world: World | None = None):
        self.prepared, self.folder, self.observer = prepared, folder, observer
        self.world = world or World()
        self.settings = prepared.settings.train
        self.model = prepared.base.model
        self.objective = objective_class(prepared.settings.objective.kind)(prepared)
        self.objective.world = self.world
        self.items = list(adapter_parameters(self.model, prepared.adapter))
        extra = list(self.objective.extra_parameters().values())
        self.parameters = [*(item.parameter for item in self.items if item.parameter.requires_grad), *extra]
        self.started = pairs_with_start(self.model, prepared.adapter)
        self.world.copy_from_first(self._replicated())
        if not self.world.is_first:
            torch.manual_seed(seed_of(self.settings.seed, self.world.rank))  # else all would drop the same
        groups = parameter_groups(self.items, self.settings)
        if extra:
            groups.append({"params": extra, "lr": self.settings.learning_rate, "lr_ratio": 1.0, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=self.settings.betas)
        self.ranks = RankAllocator(self.model, prepared.adapter) if isinstance(prepared.plan.config, AdaLoraConfig) else None
        self.digests = {
            "data": prepared.rows.digest,
            "settings": prepared.settings.digest(),
            "plan": plan_digest(prepared.steps, packed=prepared.packed),
        }
        if prepared.parent:
            self.digests["parent"] = prepared.parent[TENSOR_FILE]
        self.progress = Progress(digests=self.digests)
        self.saved_step = 0
        self.adapter_step = 0  # the step of the adapter in the model, where that is not the present one
        self.num_steps = len(prepared.steps)
        self.eval_every = self.settings.eval_every or max(1, math.ceil(self.num_steps / EVALUATIONS_PER_RUN))
        self.anchors = anchor_steps(self.num_steps, self.settings.anchors)
        self.stop_requested = False
        self.sharded: ShardedModel | None = None
        self.peak_bytes = 0
        self.base_bytes = sum(stored_bytes(tensor) for _, tensor in base_parameters(self.model))
        weight = next(self.model.parameters())
        device = weight.device
        saves_memory = weight.itemsize <= 2 or self.settings.gradient_checkpointing
        self.allocator = settle_allocator(device.type, saves_memory=saves_memory)
        self.keeps_memory = self.allocator.startswith("freed blocks")
        self.is_compiled = use_compiler(self._wants_compiler(), device)
        if self.settings.gradient_checkpointing:
            # transformers 5 renames it on its way to 6; both take torch's keywords first.
            new_name = getattr(self.model, "activation_checkpointing_enable", None)
            enable = new_name or self.model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def run(self) -> str:
        """Train until the plan is done, and return why it ended: "finished", "early stop" or "interrupted".

        After an interruption (`stop_requested`) the state is in a checkpoint. Raises: TrainingError, StorageError; the last
        checkpoint is intact then.
        """
        with self.running():
            while (ended := self.advance()) is None:
                pass
        return ended

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block steps can be made."""
        if self.prepared.fusion.attentions and not fusion_of(self.model).attentions:
            fuse(self.model)  # it was undone when this Trainer was interrupted
        if self.settings.shard == "fsdp2" and self.world.size > 1 and self.sharded is None:
            from luthier.train.sharding import ShardedModel  # a second of imports

            self.sharded = ShardedModel(self.model, self.world.size)
            release_freed_memory()
        self.model.train()
        reset_peak_memory()
        try:
            yield
        finally:
            self.peak_bytes = peak_memory()
            self.objective.close()
            self.model.eval()
            if self.sharded is None:  # fusing compares weights that are whole, so there would be no way back
                unfuse(self.model)
            use_compiler(False)
            release_scratch()

    def advance(self) -> str | None:
        """Make one step, and what is due after it; return why the run ended, or None where it goes on.

        Raises: TrainingError, StorageError, as `run`.
        """
        if self.progress.step >= self.num_steps:
            return "finished"
        # Asked first: a run that was killed after its last evaluation must not go one step further than one that was not.
        if self._is_out_of_patience():
            return "early stop"
        if self.progress.step == 0:
            self._keep_anchor()
        self._train_step()
        self._keep_anchor()
        is_last = self.progress.step == self.num_steps
        if self._is_due(self.eval_every) and self.prepared.rows.held_out is not None:
            self._evaluate()
        if self._is_due(self.eval_every) or self._is_due(self.settings.save_every):
            self.save()
        if self.world.any(self.stop_requested) and not is_last and not self._is_out_of_patience():
            self.save()
            return "interrupted"
        return "finished" if is_last else None

    def save(self) -> None:
        """Write a checkpoint of the present state, if there is none yet."""
        if self.saved_step == self.progress.step:
            return
        self._check_equal()
        random_states = self.world.gather_bytes(save_tensors(random_state()))
        self.saved_step = self.progress.step
        if not self.world.is_first:
            return
        self.progress.num_threads = torch.get_num_threads()
        state = {f"{name}.{index:05d}": value for index, name, value in self._moments()}
        # An adapter folder holds the update of such a pair, from which its factors cannot be had back bit for bit.
        state |= {f"pair.{path}.{key}": value for path, pair in self.started.items() for key, value in pair.state_dict().items()}
        state |= self.ranks.state() if self.ranks else {}
        state |= {f"objective.{name}": value for name, value in self.objective.state().items()}
        for rank, raw in enumerate(random_states):
            state |= {f"{of_rank(rank)}{name}": value for name, value in load_tensors(raw).items()}
        self.folder.save_checkpoint(self.progress, state, self.write_adapter)

    def restore(self, progress: Progress, state: dict[str, Tensor]) -> None:
        """Take up the state of a checkpoint; its adapter was attached by `prepare`. Raises: CheckpointError."""
        if progress.digests.get("data") != self.digests["data"]:
            raise CheckpointError(
                f"the rows of {self.prepared.settings.data.path} are not those this run began with; "
                "restore the file, or start a new run"
            )
        if progress.digests.get("settings") != self.digests["settings"]:
            raise CheckpointError(
                f"the settings in {self.folder.path}/config.toml are not those this run began with; "
                "restore them, or start a new run"
            )
        if progress.digests.get("parent") != self.digests.get("parent"):
            raise CheckpointError(f"{self.folder.start} is not the adapter this run continues; restore it, or start a new run")
        if progress.digests.get("plan") != self.digests["plan"]:
            raise CheckpointError(
                "the rows would meet in other steps than when this run began: its model is fused differently now (other versions "
                "of transformers or luthier?); go on with those it began with, or start a new run"
            )
        if progress.num_threads != torch.get_num_threads():
            log.warning(
                f"this run went on {progress.num_threads} threads so far and goes on with {torch.get_num_threads()}: sums are "
                f"added in another order, so the last bits will differ. "
                f"For the same bits set OMP_NUM_THREADS={progress.num_threads}."
            )
        before = 1 + sum(name.endswith(".rng.cpu") for name in state)
        if before != self.world.size:
            log.warning(
                f"this run went on with {before} process{'es' * (before > 1)} so far and goes on with {self.world.size}: "
                "sums are added in another order, so the last bits will differ, and with dropout others are dropped"
            )
        for index, parameter in enumerate(self.parameters):
            moments = {name: state[f"{name}.{index:05d}"] for name in MOMENTS if f"{name}.{index:05d}" in state}
            if moments:
                # AdamW counts its steps on the CPU.
                self.optimizer.state[parameter] = {
                    name: value if name == "step" else value.to(parameter.device) for name, value in moments.items()
                }
        if self.started:
            self._take_adapter(progress.step)
        if self.ranks is not None:
            self.ranks.restore(state)
        prefix = "objective."
        self.objective.restore({name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)})
        own = of_rank(self.world.rank)
        if f"{own}rng.cpu" in state:
            restore_random_state({name.removeprefix(own): value for name, value in state.items() if name.startswith(own)})
        else:
            torch.manual_seed(seed_of(self.settings.seed, self.world.rank, progress.step))
        self.progress, self.saved_step = progress, progress.step
        if self.world.is_first:
            self.folder.cut_log(progress.step)

    def write_adapter(self, path: Path, metrics: dict[str, Any] | None = None) -> None:
        """Write the adapter as it is now, with the recipe that makes it again."""
        left_out: Any = {"out": True, "adapter": True, "train": set(LOOKING_ON)}
        recipe = self.prepared.settings.model_dump(mode="json", exclude=left_out)
        recipe["data_digest"], recipe["step"] = self.prepared.rows.digest, self.adapter_step or self.progress.step
        recipe["data_digests"] = self.prepared.rows.digests
        if self.prepared.parent:
            recipe["continued"] = {"parent": {"files": self.prepared.parent}}
        save_adapter(self.model, path, self.prepared.adapter, recipe=recipe, metrics=metrics, base=self.prepared.fingerprint)

    def take_best(self) -> None:
        """Put the adapter of the best evaluation into the model, if it is not the present one."""
        best = self.progress.best_step
        if not best or best == self.progress.step:
            return
        self._take_adapter(best)
        self.adapter_step = best

    def _take_adapter(self, step: int) -> None:
        """Put the adapter of a checkpoint into the model."""
        stored, state = read_adapter(self.folder.step_folder(step) / "adapter").tensors, self.folder.optimizer_state(step)
        with torch.no_grad():
            for item in self.items:
                if item.role == "whole" or item.path not in self.started:
                    item.parameter.copy_(stored[item_key(item)])
        for path, pair in self.started.items():
            pair.load_state_dict({key: state[f"pair.{path}.{key}"] for key in pair.state_dict()})

    def drop_masked(self) -> None:
        """Take the triplets out that AdaLoRA masked in the adapter as it is now. Nothing can be trained here afterwards."""
        if self.ranks is not None:
            drop_masked(self.model, self.prepared.adapter)

    def _train_step(self) -> None:
        began = time.perf_counter()
        step = self.progress.step
        epoch, planned = self.prepared.steps[step]
        batches = self.objective.step_batches(step, self.world.share(planned))
        counts = [sum(getattr(batch, name) for batch in batches) for name in ("weight", "num_tokens", "labelled_tokens")]
        weight, tokens, labelled = self.world.sum(counts)
        loss = 0.0
        metrics: dict[str, float] = {}
        for batch in batches:
            loss_sum, figures = self._loss(batch)
            (loss_sum / weight).backward()
            loss += loss_sum.item() / weight
            for name, value in figures.items():
                metrics[name] = metrics.get(name, 0.0) + value / weight
        if self.sharded and self.world.is_idle_at_the_end(planned):
            # The others borrow this process's share of the weights in each pass, so it makes as many, of no weight.
            (self._loss(self.objective.micro_batch(planned[0]))[0] * 0.0).backward()
        (loss,) = self.world.sum([loss])
        metrics = self.world.sum_figures(metrics)
        self.world.sum_gradients(self.parameters)
        self._check_finite("loss", loss, planned)
        if step == 0 and not self.objective.may_rest:
            self._check_gradients()
        if self.ranks is not None and self.ranks.config.orth_reg_weight:
            self.ranks.penalty().backward()  # in the gradients only: the loss that is reported is the one of the answers
        if self.settings.report and self.world.is_first and self._is_due(self.eval_every, step + 1):
            self.folder.append_layers(step + 1, gradient_norms(self.items))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm))
        self._check_finite("gradient norm", norm, planned)
        rate = learning_rate(step, self.num_steps, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        self.optimizer.step()
        if self.ranks is not None:
            self.ranks.update(step + 1)
        self.optimizer.zero_grad(set_to_none=True)

        if not self.keeps_memory:
            release_freed_memory()
        seconds = time.perf_counter() - began
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        self.progress.labelled_tokens += int(labelled)
        self.progress.seconds += seconds
        metrics |= self.objective.figures()
        record = StepRecord(self.progress.step, epoch, loss, rate, norm, int(tokens), int(labelled), seconds, metrics)
        if self.world.is_first:
            self.folder.append_log(log_line(record))
        if self.observer is not None:
            self.observer.on_step(record)

    def _evaluate(self) -> None:
        began = time.perf_counter()
        figures = self._figures_of_held_out()
        loss = figures.pop("eval_loss")
        progress = self.progress
        is_best = progress.best_loss is None or loss < progress.best_loss
        if is_best:
            progress.best_loss, progress.best_step, progress.evals_without_gain = loss, progress.step, 0
        else:
            progress.evals_without_gain += 1
        progress.seconds += time.perf_counter() - began
        record = EvalRecord(progress.step, loss, is_best, figures)
        if self.world.is_first:
            self.folder.append_log(log_line(record))
        if self.observer is not None:
            self.observer.on_eval(record)

    def _keep_anchor(self) -> None:
        if self.world.is_first and self.progress.step in self.anchors:
            self.folder.save_anchor(self.progress.step, self.write_adapter)

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, float]]:
        return self.sharded.run(self.objective.loss, batch) if self.sharded else self.objective.loss(batch)

    def _figures_of_held_out(self) -> dict[str, float]:
        """The first process evaluates while the others wait; where the base is sharded, all of them do, on the same rows."""
        self.objective.world = World()  # whoever evaluates sees all rows
        figures: dict[str, float] = {}
        if self.sharded:
            figures = self.sharded.run(self.objective.evaluate)
            self.sharded.rest()
        elif self.world.is_first:
            figures = self.objective.evaluate()
        self.objective.world = self.world
        return self.world.from_first(figures)

    def _replicated(self) -> list[Tensor]:
        """Return what every process must hold to the same bits."""
        pairs = [tensor for _, pair in sorted(self.started.items()) for tensor in pair.state_dict().values()]
        return [*(item.parameter for item in self.items), *self.parameters, *pairs]

    def _check_equal(self) -> None:
        """Raise TrainingError if the processes no longer hold the same adapter: a checkpoint would be of one of them only."""
        if self.world.size == 1:
            return
        digest = hashlib.sha256()
        for tensor in self._replicated():
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests = self.world.gather(digest.hexdigest())
        if others := [rank for rank, each in enumerate(digests) if each != digests[0]]:
            raise TrainingError(
                f"after step {self.progress.step} the adapter of process {others[0]} is not that of process 0 to the bit: an "
                f"exchange went wrong, or the machines compute differently. The last checkpoint is at step {self.saved_step}"
            )

    def _wants_compiler(self) -> bool:
        if self.settings.compile == "auto":
            # Of the whole plan, not of what is left: a resumed run must decide as it did before.
            lengths = self.prepared.rows.item_lengths
            tokens = sum(lengths[item] for _, batches in self.prepared.steps for batch in batches for item in batch)
            return tokens >= TOKENS_WORTH_COMPILING
        return self.settings.compile == "on"

    def _is_due(self, every: int | None, step: int | None = None) -> bool:
        step = self.progress.step if step is None else step
        return bool(every) and (step % (every or 1) == 0 or step == self.num_steps)

    def _moments(self) -> list[tuple[int, str, Tensor]]:
        return [
            (index, name, value.detach().cpu())
            for index, parameter in enumerate(self.parameters)
            # A parameter that never had a gradient (an expert nobody asked) has no moments yet.
            for name, value in self.optimizer.state.get(parameter, {}).items()
        ]

    def _is_out_of_patience(self) -> bool:
        return bool(self.settings.patience) and self.progress.evals_without_gain >= (self.settings.patience or 0)

    def _check_finite(self, what: str, value: float, planned: list[list[int]]) -> None:
        if math.isfinite(value):
            return
        items = [index for indices in planned for index in indices]
        rows = sorted({row.row for index in items for row in self.prepared.rows.item(index)})
        raise DivergedError(
            f"the {what} of step {self.progress.step + 1} is {value} (rows {rows[:8]}{' ...' if len(rows) > 8 else ''}). "
            f"Nothing was updated; the last checkpoint is at step {self.saved_step}. Try a lower learning rate (now "
            f"{self.settings.learning_rate:g}) or dtype float32."
        )

    def _check_gradients(self) -> None:
        """A pair that gets no gradient in the first step is not part of the forward pass: training it would do nothing."""
        moved: dict[str, bool] = {}
        for item in self.items:
            gradient = item.parameter.grad
            got = gradient is not None and bool(gradient.any())
            moved[item.path] = moved.get(item.path, False) or got
        still = [path for path, got in moved.items() if not got]
        if len(still) == len(moved):
            raise TrainingError("no part of the adapter received a gradient in the first step; nothing would be learned")
        if still:
            some = ", ".join(still[:5])
            log.warning(f"{len(still)} of {len(moved)} adapted modules received no gradient in the first step: {some}")


class Stoppable(Protocol):
    """What ends after its present step when it is asked to."""

    stop_requested: bool


def stop_on_signal(trainer: Stoppable) -> Callable[[int, Any], None]:
    """Return a signal handler that lets the step finish and a checkpoint be written; a second signal stops at once."""

    def handle(number: int, frame: Any) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    return handle
