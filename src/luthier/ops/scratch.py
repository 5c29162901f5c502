"""Memory for what lives no longer than one call: the same buffers again, instead of large blocks asked for and given back.

glibc does not fit a freed block to the next request of the same size reliably, so large temporaries between tensors that stay
leave holes: in a float32 step of 4 x 512 tokens those were a quarter of the peak. A buffer's content is gone at the next
`scratch` of its name in the same thread, so nothing that is saved or returned may lie in one.
"""

import math
import threading

import torch
from torch import Tensor

from luthier.ops.placement import device_kind


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}


_buffers = _Buffers()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialised memory in `shape`. Where another device has an allocator that keeps blocks it is a new tensor."""
    if device_kind(device) != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer = _buffers.by_name.get(name)
    if buffer is None or buffer.nbytes < size or buffer.device.type != device.type:
        _buffers.by_name.pop(name, None)
        buffer = _buffers.by_name[name] = torch.empty(size, dtype=torch.uint8, device=device)
    return buffer[:size].view(dtype).view(shape)


def widened(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` itself if it has the dtype, else a copy of it in the buffer `name`."""
    return tensor if tensor.dtype == dtype else scratch(name, tuple(tensor.shape), dtype, tensor.device).copy_(tensor)


def release_scratch() -> None:
    """Let go of this thread's buffers."""
    _buffers.by_name.clear()
