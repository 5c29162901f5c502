"""Chains of element-wise operations: one pass over memory where a compiler is there, torch's own operations on blocks where not.

Only small kernels are compiled, each once for all layers and lengths (shapes are symbolic from the start, so the order in which
lengths come changes nothing), and never a whole layer: the matrix products gain nothing from it.
"""

import logging
import shutil
import warnings
from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any

import torch

log = logging.getLogger(__name__)

_is_on = False


def use_compiler(wanted: bool, device: torch.device | str = "cpu") -> bool:
    """Say whether kernels are compiled from now on, in this process; return whether they are: not where no compiler is found."""
    global _is_on
    _is_on = wanted and has_compiler(device)
    return _is_on


def has_compiler(device: torch.device | str = "cpu") -> bool:
    """Return whether torch.compile can work for `device` here: a C++ compiler for the CPU, Triton for a GPU."""
    if torch.device(device).type != "cpu":
        import importlib.util

        return importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


BLOCK_BYTES = 2**20
"""Of the first input in one block on the CPU: what a chain forms in between stays in the cache and is never a large block."""


class Kernel:
    """A function of tensors that is compiled at its first use after `use_compiler(True)`. `plain` is the function itself.

    Row i of each result must depend on row i of the inputs alone; inputs with one axis are the same for all rows, results with
    one axis are sums over them.
    """

    def __init__(self, plain: Callable[..., Any]):
        self.plain = plain
        update_wrapper(self, plain)

    def __call__(self, *args: Any, out: torch.Tensor | None = None) -> Any:
        """Call it; `out` is memory for the result, which is used where the result is made block by block."""
        if not _is_on:
            return self._in_blocks(args, out)
        # What a graph is made anew for is kept out of it: whether someone wants gradients of this input.
        tensors: Any = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # inductor's own, about its own imports
                return self._compiled(*tensors)
        except torch._dynamo.exc.TorchDynamoException as error:  # no working compiler, or too many kinds of input in one process
            use_compiler(False)
            log.warning(f"the compiler failed ({str(error).splitlines()[0][:200]}); going on without it")
            return self._in_blocks(args, out)

    def _in_blocks(self, args: tuple[Any, ...], out: torch.Tensor | None) -> Any:
        first = args[0]
        step = max(1, BLOCK_BYTES * len(first) // max(1, first.nbytes))
        if first.device.type != "cpu" or len(first) <= step:
            return self.plain(*args)
        outputs = [] if out is None else [out]
        for start in range(0, len(first), step):
            rows = slice(start, start + step)
            parts: Any = self.plain(*(each[rows] if isinstance(each, torch.Tensor) and each.ndim > 1 else each for each in args))
            parts = parts if isinstance(parts, tuple) else (parts,)
            outputs = outputs or [
                part.new_empty((len(first), *part.shape[1:])) if part.ndim > 1 else torch.zeros_like(part) for part in parts
            ]
            for output, part in zip(outputs, parts, strict=True):
                if part.ndim > 1:
                    output[rows] = part
                else:
                    output += part
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.plain, dynamic=True, fullgraph=True)
