"""Which kind of device a tensor is on, where a tensor on the meta device stands for one elsewhere.

What an operation keeps depends on the device. A tensor on the meta device has a shape and no numbers; whoever counts what a step
would take runs the step on such tensors and says here where it would really run.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_stands_for = "meta"


def device_kind(device: torch.device) -> str:
    """Return the type of `device`; for the meta device that which it stands for."""
    return _stands_for if device.type == "meta" else device.type


@contextmanager
def meta_stands_for(kind: str) -> Iterator[None]:
    """Inside the block, tensors on the meta device are treated as if they were on a device of this kind."""
    global _stands_for
    before, _stands_for = _stands_for, kind
    try:
        yield
    finally:
        _stands_for = before
