"""The World of several processes over torch.distributed, joined as the environment says (torchrun's or our launcher's).

Figures, flags and random states travel over gloo on the CPU; gradients over what belongs to their device (gloo, or NCCL). What
travels is JSON and plain tensors, never a pickle. A process that dies closes its sockets, which the others notice at their next
exchange: they end with ProcessLostError.

Environment: RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR, MASTER_PORT as torchrun sets them; LUTHIER_RENDEZVOUS, a file in the
place of the last two; LUTHIER_PROCESS_TIMEOUT, the seconds that one process waits for the others.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luthier.core.errors import ConfigError, LuthierError, ProcessLostError
from luthier.train.launching import RENDEZVOUS, process_of
from luthier.train.world import World

TIMEOUT = "LUTHIER_PROCESS_TIMEOUT"
DEFAULT_TIMEOUT_S = 1800.0
"""An evaluation by the first process alone must be done by then."""

_joined: list["Processes"] = []


@dataclass(frozen=True)
class Processes(World):
    """Process `rank` of `size`; `store` holds a few words that all of them can read."""

    store: Any = None

    def gather_bytes(self, raw: bytes) -> list[bytes]:
        """Return what each process gave, by rank."""
        length = torch.tensor([len(raw)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length)
        longest = max(int(each) for each in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        if raw:
            padded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        found = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(found, padded)
        return [each[: int(length)].numpy().tobytes() for each, length in zip(found, lengths, strict=True)]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients over the processes, in place: one exchange for each dtype, which there is mostly one of.

        A parameter may have a gradient in some processes only (an expert that was asked in those); behind the numbers goes a flag
        for each that says so. Where no process has one it stays None, so that AdamW passes it over as it does in one process.
        """
        trained = sorted((each for each in parameters if each.requires_grad), key=lambda each: str(each.dtype))
        for dtype, group in groupby(trained, key=lambda each: each.dtype):
            same = list(group)
            parts = [torch.zeros_like(each) if each.grad is None else each.grad for each in same]
            has = torch.tensor([each.grad is not None for each in same], dtype=dtype, device=same[0].device)
            flat = torch.cat([*(part.reshape(-1) for part in parts), has])
            dist.all_reduce(flat)
            *summed, has = flat.split([*(each.numel() for each in same), len(same)])
            for parameter, gradient, count in zip(same, summed, has.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = gradient.view_as(parameter).clone()
                elif count:
                    parameter.grad.copy_(gradient.view_as(parameter))  # type: ignore[union-attr]

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors with those of the first process."""
        for tensor in tensors:
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, src=0)
            tensor.detach().copy_(sent)

    def is_first_to_tell(self, message: str) -> bool:
        """Return whether no other process has claimed yet to tell this error: many may fail of the same."""
        try:
            self.store.set("told", "yes")
            return int(self.store.add(f"told {hashlib.sha256(message.encode()).hexdigest()}", 1)) == 1
        except RuntimeError:
            return True  # the store was the first process's, and is gone with it

    def lost(self, error: Exception) -> ProcessLostError:
        """Return what to raise for an exchange that failed: told by this process only if nobody knows better."""
        found = ProcessLostError(
            f"process {self.rank} of {self.size} lost the others: one of them ended, or did not answer within "
            f"{_timeout().total_seconds():g} s ({TIMEOUT}). The last checkpoint is intact; continue with --resume. "
            f"What was seen: {str(error).splitlines()[0]}"
        )
        try:
            is_known = RENDEZVOUS in os.environ or self.store.check(["told"])
        except RuntimeError:
            is_known = False
        found.is_told = is_known or not self.is_first_to_tell("lost")
        return found


@contextmanager
def joined() -> Iterator[World]:
    """Within the block this process is one of those that the environment speaks of; blocks inside of it are the same.

    An error that leaves the block is marked where another process tells it already (`LuthierError.is_told`).
    Raises: ProcessLostError if another process ended; ConfigError for an environment that makes no sense.
    """
    if _joined or process_of(os.environ)[1] == 1:
        yield _joined[0] if _joined else World()
        return
    world = _join()
    _joined.append(world)
    try:
        yield world
    except LuthierError as error:
        error.is_told = not world.is_first_to_tell(str(error))
        raise
    except RuntimeError as error:
        if not _is_lost_contact(error):
            raise
        raise world.lost(error) from error
    finally:
        _joined.clear()
        dist.destroy_process_group()


def _join() -> Processes:
    rank, size = process_of(os.environ)
    backend = "gloo"
    if torch.cuda.is_available():
        place = int(os.environ.get("LOCAL_RANK", rank))
        if place >= torch.cuda.device_count():
            raise ConfigError(f"process {place} of this machine has no GPU of its own: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(place)
        backend = "cpu:gloo,cuda:nccl"
    try:
        if RENDEZVOUS in os.environ:
            store = dist.FileStore(os.environ[RENDEZVOUS], size)
            store.set_timeout(_timeout())
        else:
            store, rank, size = next(iter(dist.rendezvous("env://", timeout=_timeout())))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_timeout())
    except (RuntimeError, ValueError) as error:
        raise ProcessLostError(f"process {rank} of {size} cannot join the others: {error}") from error
    return Processes(rank, size, dist.PrefixStore("luthier", store))


def _timeout() -> timedelta:
    given = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ConfigError(f"{TIMEOUT} is {given!r}; it is a number of seconds above 0")
    return timedelta(seconds=seconds)


def _is_lost_contact(error: RuntimeError) -> bool:
    # gloo raises plain RuntimeErrors; what they have in common is the file they name.
    return isinstance(error, dist.DistError) or "gloo" in str(error)
