"""Chains of element-wise operations, as one pass over memory where a compiler is there and as torch's own operations where not.

Only small kernels are compiled, each once for all layers and lengths (shapes are symbolic from the start, so the order in which
lengths come changes nothing), and never a whole layer: the matrix products gain nothing from it.
"""

import logging
import shutil
import warnings
from collections.abc import Callable
from functools import cached_property, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

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


class Kernel(Generic[P, R]):
    """A function of tensors that is compiled at its first use after `use_compiler(True)`. `plain` is the function itself."""

    def __init__(self, plain: Callable[P, R]):
        self.plain = plain
        update_wrapper(self, plain)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_on:
            return self.plain(*args, **kwargs)
        # What a graph is made anew for is kept out of it: whether someone wants gradients of this input.
        tensors: Any = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # inductor's own, about its own imports
                result: R = self._compiled(*tensors, **kwargs)
                return result
        except torch._dynamo.exc.TorchDynamoException as error:  # no working compiler, or too many kinds of input in one process
            use_compiler(False)
            log.warning(f"the compiler failed ({str(error).splitlines()[0][:200]}); going on without it")
            return self.plain(*args, **kwargs)

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.plain, dynamic=True, fullgraph=True)
