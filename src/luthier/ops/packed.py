"""PackedTensor: a 4-bit weight that looks like the dense one, and is read back into reused memory when it is multiplied.

    y = x W^T + b, dx = dy W        W formed twice; between the two passes only its codes are kept

A layer with such a weight needs no forward of its own. Any other operation reads the weight back into new memory and gives
plain tensors; what would write into it is refused.

Shape letters: O out_features, I in_features; `...` any leading axes.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map_only

from luthier.core.errors import AdapterStateError
from luthier.ops.scratch import scratch
from luthier.quant.nf4 import Impl, NF4Weight, dequantize_nf4


class PackedTensor(Tensor):
    """The weight `stored`, with its shape, dtype and device. `impl` is how it is read back (`dequantize_nf4`)."""

    stored: NF4Weight
    impl: Impl

    @staticmethod
    def __new__(cls, stored: NF4Weight, impl: Impl = "fast") -> "PackedTensor":
        made = Tensor._make_wrapper_subclass(cls, stored.shape, dtype=stored.dtype, device=stored.codes.device)
        made.stored, made.impl = stored, impl
        return made

    def __init__(self, stored: NF4Weight, impl: Impl = "fast"):
        pass

    def read(self, out: Tensor | None = None) -> Tensor:
        """Return the dense weight, written into `out` if there is one."""
        return dequantize_nf4(self.stored, out=out, impl=self.impl)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return packed_linear(*args, **(kwargs or {}))
        if func is Tensor.__setitem__:
            refuse_writing()  # it would go to a view of the dense copy, and be lost
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].stored, args[0].impl)
        kwargs = kwargs or {}
        declared = {argument.name: argument for argument in func._schema.arguments}
        given = dict(zip(declared, args, strict=False)) | kwargs
        if any(isinstance(value, PackedTensor) and _is_written(declared[name]) for name, value in given.items()):
            refuse_writing()
        args, kwargs = tree_map_only(PackedTensor, PackedTensor.read, (args, kwargs))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = PackedTensor(self.stored.copied(), self.impl)
        memo[id(self)] = made = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.stored, self.impl, isinstance(self, nn.Parameter))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedTensor({tuple(self.shape)}, {self.dtype}, {self.stored.bits_per_weight:.2f} bits a weight)"


def packed_parameter(stored: NF4Weight, impl: Impl = "fast") -> nn.Parameter:
    """Return a frozen parameter that holds a 4-bit weight."""
    return nn.Parameter(PackedTensor(stored, impl), requires_grad=False)


def dense(weight: Tensor) -> Tensor:
    """Return `weight` itself, or a 4-bit one read back into memory that is good until the next call."""
    if not isinstance(weight, PackedTensor):
        return weight
    return weight.read(scratch("dense", tuple(weight.shape), weight.dtype, weight.device))


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes in memory: of a 4-bit weight, those of its codes and scales."""
    return tensor.stored.num_bytes if isinstance(tensor, PackedTensor) else tensor.nbytes


def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b (..., O) for a 4-bit weight (O, I). Gradients go to x (..., I) and the bias (O,), never to the weight.

    The names of the arguments are those of `torch.nn.functional.linear`, which it stands in for.
    Raises: AdapterStateError where the weight is to be trained.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise AdapterStateError("a weight stored in 4 bits cannot be trained; freeze it and train an adapter")
    output: Tensor = _PackedLinear.apply(input, weight, bias)
    return output


def refuse_writing() -> NoReturn:
    """Raise AdapterStateError: a 4-bit weight has no place for a number that is not one of its codes."""
    raise AdapterStateError(
        "a weight stored in 4 bits is not written into: most small changes would round away. merge(model) puts a dense weight in "
        "its place and unmerge(model) brings it back"
    )


class _PackedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.bias_dtype = x.dtype, bias.dtype if bias is not None else None
        return F.linear(x, dense(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (weight,) = ctx.saved_tensors
        # Under autocast y is narrower than x, or than the weight.
        dx = (dy @ dense(weight).to(dy.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        d_bias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return dx, None, d_bias


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _rebuilt(stored: NF4Weight, impl: Impl, is_parameter: bool) -> Tensor:
    return packed_parameter(stored, impl) if is_parameter else PackedTensor(stored, impl)
