"""FSDP2: each process keeps a share of the frozen base and borrows the rest of a block while that block runs.

The adapter's own parameters are left out: they are small, every process has all of them, and the loop adds up their gradients.
So attach and fuse first, then shard; what is sharded cannot be detached or merged. A block's gradients pass through weights that
were gathered again, which autograd sees as the ones it saved: FSDP2 frees and refills the storage of one and the same tensor.

The forward pass is the whole of an objective's loss (`ShardedModel.run`): our passes call the decoder and read the head's weight,
so the model's own forward, where FSDP2 would gather embedding and head, never runs.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from luthier.adapt.state import adapter_prefixes
from luthier.core.errors import ConfigError
from luthier.layers.packed import PackedLinear
from luthier.ops.packed import PackedTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
METHOD = "_luthier_run"
CODES = "codes"


class ShardedModel:
    """A model whose base's weights are spread over the processes, block by block. Every process makes it, of equal models.

    Raises: ConfigError for a model whose blocks are not known.
    """

    def __init__(self, model: "PreTrainedModel", size: int):
        blocks, inside = blocks_of(model), adapter_prefixes(model)
        kept = {parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name.startswith(inside)}
        mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
        for block in blocks:
            packed = _with_codes_apart(block)
            kept |= {layer.weight for layer in packed}
            fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
            if packed:
                block.register_forward_pre_hook(partial(_bind_codes, packed))  # after FSDP2's own, which gathers the codes
        fully_shard(model, mesh=mesh, ignored_params=kept)
        setattr(model, METHOD, _call)
        register_fsdp_forward_method(model, METHOD)
        self.model = model

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Return function(*args) as the model's forward pass. Every process must make as many of them."""
        found: T = getattr(self.model, METHOD)(function, *args)
        return found

    def rest(self) -> None:
        """Let go of the borrowed embedding and head, after passes that no backward pass followed."""
        cast(FSDPModule, self.model).reshard()


def blocks_of(model: "PreTrainedModel") -> list[nn.Module]:
    """Return the decoder's blocks: what the architecture says is not to be split. Raises: ConfigError where it says nothing."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if names & {cls.__name__ for cls in type(module).__mro__}]
    if not blocks:
        raise ConfigError(f"train.shard: {type(model).__name__} does not say what its blocks are; leave the setting out")
    return blocks


def _with_codes_apart(block: nn.Module) -> list[PackedLinear]:
    """Give each 4-bit layer of a block its codes as a parameter, which can be spread; return these layers.

    FSDP2 would cut the weight itself by reading it back, and hold shares of a dense one. Scales stay, an eighth of a bit each.
    """
    packed = [each for each in block.modules() if isinstance(each, PackedLinear) and isinstance(each.weight, PackedTensor)]
    for layer in packed:
        layer.register_parameter(CODES, nn.Parameter(cast(PackedTensor, layer.weight).stored.codes, requires_grad=False))
    return packed


def _bind_codes(packed: list[PackedLinear], block: nn.Module, args: Any) -> None:
    """Let the weights be read from the gathered codes: from now on one and the same tensor, empty between passes."""
    for layer in packed:
        weight = cast(PackedTensor, layer.weight)
        weight.stored = replace(weight.stored, codes=layer.get_parameter(CODES))


def _call(function: Callable[..., T], *args: Any) -> T:
    return function(*args)
