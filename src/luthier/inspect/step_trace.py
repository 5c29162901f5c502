"""One training step on the meta device: what it would hold at each moment and what it would multiply; no number is formed.

The model's own code runs, forward and backward, on tensors that have shapes only. Every block of memory is noted when an
operation makes it and when the last tensor that needs it is gone, so nothing about an architecture has to be known beforehand.

Of many decoder blocks that are alike only two and then four are run: each further pair adds what the second pair added.

Attention is the exception: on the meta device torch would form the whole square of scores, which its kernels on real devices
never hold. There q, k, v, the output and one float32 number per query and head are kept, as those kernels do.
Source: Dao 2023, FlashAttention-2, arXiv:2307.08691, section 3.1.

Shape letters: B rows, T tokens of a row, H heads, D head width, V vocabulary.
"""

import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.adapt.attaching import attach, detach
from luthier.adapt.fusing import decoder_of, fuse, fusion_of, unfuse
from luthier.adapt.planning import AttachPlan, PlannedLayer, plan
from luthier.core.errors import ModelError
from luthier.core.lora import expert_factors
from luthier.layers.fused import needs_finishing, projection_of
from luthier.ops.attention import is_blocked
from luthier.ops.cross_entropy import labelled_cross_entropy
from luthier.ops.documents import Documents
from luthier.ops.packed import PackedTensor
from luthier.ops.placement import device_kind, meta_stands_for
from luthier.ops.products import fast_products
from luthier.ops.scratch import release_scratch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Path = Literal["fused", "plain", "peft"]
"""How a step is computed: by luthier's passes over known blocks, by the model's own, or as PEFT and a transformers Trainer do."""

META = torch.device("meta")
DEPTHS = (2, 4)
"""Blocks that are traced of those that are alike."""
_TRACING = threading.Lock()
"""One trace at a time: while it runs, torch's attention is another, and meta tensors stand for those of one kind of device."""
aten = torch.ops.aten


@dataclass(frozen=True)
class StepShape:
    """What decides a step's size besides the model: `labelled` is the share of tokens that are predicted."""

    rows: int
    length: int
    path: Path = "fused"
    checkpointing: bool = False
    device: str = "cpu"
    labelled: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.rows * self.length

    @property
    def num_labelled(self) -> int:
        """Tokens of one row that are predicted; its first never is."""
        return max(1, round(self.labelled * (self.length - 1)))


@dataclass(frozen=True)
class StepTrace:
    """Bytes of one step beyond the weights, and what it multiplies.

    `saved_bytes` is what autograd saves in the layers (without checkpointing), `kept_bytes` all that there is when they are
    done: that, their input and output, and with checkpointing the input of each. The others are the most there is at once: in the
    layers on the way forward, in head and loss, in the upper and in the lower half of the layers on the way back, where gradients
    come to be while what was kept goes. `gradient_bytes` is what it ends with. `products` counts matrix products by their (rows,
    inner, columns); `attention_flops` are those inside attention kernels.
    """

    saved_bytes: int
    kept_bytes: int
    forward_bytes: int
    loss_bytes: int
    upper_bytes: int
    lower_bytes: int
    gradient_bytes: int
    products: Counter[tuple[int, int, int]] = field(repr=False)
    attention_flops: int

    @property
    def flops(self) -> int:
        """Floating-point operations of all products, a multiplication and an addition being two."""
        return self.attention_flops + sum(2 * m * k * n * count for (m, k, n), count in self.products.items())

    @property
    def backward_bytes(self) -> int:
        return max(self.upper_bytes, self.lower_bytes)

    @property
    def peak_bytes(self) -> int:
        return max(self.forward_bytes, self.loss_bytes, self.backward_bytes)

    def grown(self, deeper: "StepTrace", times: float) -> "StepTrace":
        """Return this trace with the difference to `deeper`, which has some layers more, added so many times."""
        values: dict[str, Any] = {
            each.name: round(getattr(self, each.name) + times * (getattr(deeper, each.name) - getattr(self, each.name)))
            for each in fields(self)
            if each.name != "products"
        }
        counts = {key: round(self.products[key] + times * (count - self.products[key])) for key, count in deeper.products.items()}
        return StepTrace(products=Counter(counts), **values)


def trace_step(model: "PreTrainedModel", planned: AttachPlan | None, shape: StepShape, *, freeze_A: bool = False) -> StepTrace:
    """Trace a step of `model` (on the meta device) with the adapter of `planned`, or of full fine-tuning where it is None.

    The model is as before afterwards. Raises: ModelError if its forward pass asks for numbers, which there are none of.
    """
    blocks = alike_blocks(model, planned)
    if blocks is None or len(blocks) <= DEPTHS[1]:
        return trace_whole(model, planned, shape, freeze_A=freeze_A)
    first, second = (_trace_some(model, planned, shape, freeze_A, blocks, depth) for depth in DEPTHS)
    return first.grown(second, (len(blocks) - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0]))


def alike_blocks(model: "PreTrainedModel", planned: AttachPlan | None) -> nn.ModuleList | None:
    """Return the list of the decoder's blocks if all are alike, with what an adapter puts into them; else None."""
    decoder = decoder_of(model)
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [each for each in decoder.children() if isinstance(each, nn.ModuleList) and len(each) == count] if decoder else []
    if len(lists) != 1:
        return None
    signs = {tuple((path, type(each), _shapes(each)) for path, each in block.named_modules()) for block in lists[0]}
    if planned is not None:
        prefix = next(path for path, module in model.named_modules() if module is lists[0])
        inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.*)")
        paired: dict[str, set[Any]] = {str(index): set() for index in range(len(lists[0]))}
        for layer in planned.layers:
            if match := inside.fullmatch(layer.path):
                paired[match[1]].add((match[2], layer.r, layer.num_parameters))
        if (
            any(inside.fullmatch(path) for path in (*planned.saved, *planned.biases))
            or len(set(map(frozenset, paired.values()))) > 1
        ):
            return None
    return lists[0] if len(signs) == 1 else None


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters(recurse=False))


def _trace_some(
    model: "PreTrainedModel", planned: AttachPlan | None, shape: StepShape, freeze_A: bool, blocks: nn.ModuleList, depth: int
) -> StepTrace:
    """Trace the model as if it had only so many blocks."""
    above = dict(list(blocks._modules.items())[depth:])
    for name in above:
        del blocks._modules[name]
    try:
        return trace_whole(model, planned and plan(model, planned.config), shape, freeze_A=freeze_A)
    finally:
        blocks._modules.update(above)


def trace_whole(model: "PreTrainedModel", planned: AttachPlan | None, shape: StepShape, *, freeze_A: bool = False) -> StepTrace:
    """As `trace_step`, through every layer."""
    with ExitStack() as stack:
        stack.enter_context(_TRACING)
        stack.enter_context(meta_stands_for(shape.device))
        stack.callback(release_scratch)
        stack.callback(model.zero_grad)
        release_scratch()
        _prepare(stack, model, planned, shape, freeze_A)
        live = _Live([*model.parameters(), *model.buffers()])
        decoder = decoder_of(model)
        marks: dict[str, int] = {}

        def after_layers(*_: Any) -> None:
            marks.update(forward=live.take_peak(), kept=live.held, saved=sum(live.saved.values()))

        def halfway_back(_: Any) -> None:
            marks["upper"] = max(marks.get("upper", 0), live.take_peak())

        def watch_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(halfway_back)

        if decoder is not None:
            stack.callback(decoder.register_forward_hook(after_layers).remove)
            middle = next((list(each)[len(each) // 2] for each in decoder.children() if isinstance(each, nn.ModuleList)), None)
            if middle is not None:
                stack.callback(middle.register_forward_pre_hook(watch_gradient, with_kwargs=True).remove)
        try:
            saving = torch.autograd.graph.saved_tensors_hooks(live.note_saved, lambda tensor: tensor)
            with live, _tiled_attention(live, shape), saving:
                loss = _loss(model, decoder, shape)
                loss_bytes = live.take_peak()
                forward, kept = marks.get("forward", loss_bytes), marks.get("kept", live.held)
                loss.backward()
                del loss
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            raise ModelError(f"A step of this {type(model).__name__} cannot be traced without its numbers: {error}") from error
        gradients = sum(each.grad.nbytes for each in model.parameters() if each.grad is not None)
        lower = live.take_peak()
        upper = marks.get("upper", lower)
        saved = marks.get("saved", sum(live.saved.values()))
        return StepTrace(saved, kept, forward, loss_bytes, upper, lower, gradients, live.products, live.attention_flops)


def _prepare(stack: ExitStack, model: "PreTrainedModel", planned: AttachPlan | None, shape: StepShape, freeze_A: bool) -> None:
    if planned is None:
        model.requires_grad_(True)
    elif shape.path == "peft":
        model.requires_grad_(False)
        for layer in planned.layers:
            module = model.get_submodule(layer.path)
            if layer.parameter:
                parametrize.register_parametrization(module, layer.parameter, _PeftStack(layer, freeze_A), unsafe=True)
                stack.callback(parametrize.remove_parametrizations, module, layer.parameter, leave_parametrized=False)
                continue
            pair = _PeftPair(layer.in_features, layer.out_features, layer.r, freeze_A)
            module.add_module("traced_pair", pair)
            stack.callback(_take_off, module, module.register_forward_hook(pair.add_to))
    else:
        attach(model, planned.config)
        stack.callback(detach, model)
        for name, parameter in model.named_parameters():
            if freeze_A and name.endswith("lora_A"):
                parameter.requires_grad_(False)
    model.train()
    if shape.path == "fused":
        fuse(model)
        stack.callback(unfuse, model)
    if shape.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
        # There are no random numbers to be drawn again.
        enable({"use_reentrant": False, "preserve_rng_state": False})
        stack.callback(disable)


class _PeftPair(nn.Module):
    """A pair as PEFT computes it: float32 matrices, given a copy of x in float32."""

    def __init__(self, in_features: int, out_features: int, r: int, freeze_A: bool):
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=META), requires_grad=not freeze_A)
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=META))

    def add_to(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(self.lora_A.dtype)
        return (output + F.linear(F.linear(x, self.lora_A), self.lora_B) * 2.0).to(output.dtype)


class _PeftStack(nn.Module):
    """A pair of a stack of experts as PEFT computes it: the dense update in float32, scaled and cast, is added to the stack."""

    def __init__(self, layer: PlannedLayer, freeze_A: bool):
        super().__init__()
        a, b = layer.shapes["lora_A"], layer.shapes["lora_B"]
        self.lora_A = nn.Parameter(torch.empty(a, device=META), requires_grad=not freeze_A)
        self.lora_B = nn.Parameter(torch.empty(b, device=META))
        self.num_experts, self.is_transposed = layer.num_experts, layer.is_transposed

    def forward(self, weight: Tensor) -> Tensor:
        left, right = expert_factors(self.lora_A, self.lora_B, self.num_experts, self.is_transposed)
        return weight + (torch.bmm(left, right) * 2.0).to(weight.dtype).view_as(weight)


def _take_off(module: nn.Module, handle: Any) -> None:
    handle.remove()
    del module.traced_pair


def _loss(model: "PreTrainedModel", decoder: nn.Module | None, shape: StepShape) -> Tensor:
    """The loss as `luthier.engine` takes it, whose positions would have to be read off numbers; PEFT's is the model's own."""
    ids_BT = torch.zeros(shape.rows, shape.length, dtype=torch.long, device=META)
    if shape.path == "peft":
        loss: Tensor = model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        return loss
    few_K = torch.arange(shape.num_labelled, device=META)
    fusion = fusion_of(model)
    if decoder is None or not fusion.head_is_plain:
        logits_BKV = model(input_ids=ids_BT, use_cache=False, logits_to_keep=few_K).logits
        targets = torch.zeros(logits_BKV.shape[:2].numel(), dtype=torch.long, device=META)
        logits = logits_BKV.flatten(0, 1).index_select(0, torch.arange(len(targets), device=META))
        return F.cross_entropy(logits.float(), targets, reduction="sum")
    if fusion.packs:
        documents = Documents((shape.length,) * shape.rows, META)
        hidden = decoder(
            input_ids=ids_BT.view(1, -1),
            position_ids=documents.position_ids,
            attention_mask=torch.empty(1, 1, 0, 0, device=META),
            use_cache=False,
            documents=documents,
        ).last_hidden_state
    else:
        hidden = decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    labelled = torch.arange(shape.rows * shape.num_labelled, device=META)
    hidden_KI, targets_K = hidden.flatten(0, 1).index_select(0, labelled), torch.zeros_like(labelled)
    del hidden
    head = model.get_output_embeddings()
    projection = projection_of(head, hidden_KI)
    if projection is not None and not projection.dropout and not needs_finishing(head):
        return labelled_cross_entropy(hidden_KI, targets_K, projection, products=fast_products(hidden_KI))
    return F.cross_entropy(head(hidden_KI).float(), targets_K, reduction="sum")


class _Live(TorchDispatchMode):
    """Notes every block of memory that operations make, until it is gone, and every matrix product."""

    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.held = self.peak = self.attention_flops = 0
        self.products: Counter[tuple[int, int, int]] = Counter()
        self.blocks: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self.saved: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def take_peak(self) -> int:
        """Return the most that was held since the last call."""
        peak, self.peak = self.peak, self.held
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            # Models ask whether positions are those of one row, or a mask full: they are.
            return 1.0 if args[0].dtype.is_floating_point else 1
        kwargs = kwargs or {}
        result = _grouped_product(*args, **kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        if (find := PRODUCTS.get(func)) is not None:
            batch, *sizes = find(*args)
            self.products[tuple(sizes)] += batch  # type: ignore[index]
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, block: Any) -> None:
        if block in self.blocks or block._cdata in self.known:
            return
        self.blocks[block] = True
        size = block.nbytes()
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(block, self._drop, size).atexit = False

    def note_saved(self, tensor: Tensor) -> Tensor:
        """Note what autograd saves. Detached, since a graph that holds its own output is never freed."""
        block = tensor.untyped_storage()
        if block._cdata not in self.known:
            self.saved[block] = block.nbytes()
        return tensor.detach()

    def _drop(self, size: int) -> None:
        self.held -= size


def _of_matrices(a: Tensor, b: Tensor, *_: Any) -> tuple[int, int, int, int]:
    return 1, a.shape[0], a.shape[1], b.shape[1]


def _of_batches(a: Tensor, b: Tensor, *_: Any) -> tuple[int, int, int, int]:
    return a.shape[0], a.shape[1], a.shape[2], b.shape[2]


def _of_groups(a: Tensor, b: Tensor, *_: Any) -> tuple[int, int, int, int]:
    return a.shape[0] if a.ndim == b.ndim == 3 else 1, a.shape[-2], a.shape[-1], b.shape[-1]


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What `_grouped_mm` returns: rows that go to one expert each times that expert's matrix. torch's own meta kernel knows
    bfloat16 alone. However rows are routed, the shapes are the same.
    """
    groups = () if a.ndim != b.ndim else (a.shape[0],) if a.ndim == 3 or offs is None else (len(offs),)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _after_first(find: Callable[..., tuple[int, int, int, int]]) -> Callable[..., tuple[int, int, int, int]]:
    return lambda _, a, b, *rest: find(a, b)


PRODUCTS: dict[Any, Callable[..., tuple[int, int, int, int]]] = {
    aten.mm.default: _of_matrices,
    aten.mm.out: _of_matrices,
    aten.addmm.default: _after_first(_of_matrices),
    aten.addmm.out: _after_first(_of_matrices),
    aten.addmm_.default: _after_first(_of_matrices),
    aten.bmm.default: _of_batches,
    aten.bmm.out: _of_batches,
    aten.baddbmm.default: _after_first(_of_batches),
    aten._grouped_mm.default: _of_groups,
}
"""Operation -> (how many products, rows, inner, columns) of its arguments."""


@contextmanager
def _tiled_attention(live: _Live, shape: StepShape) -> Iterator[None]:
    """Inside the block, torch's attention is what its tiled kernels make of it, or what luthier's blocks do."""
    own = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:  # another thread's, which computes
            return own(query, key, value, *args, **kwargs)
        seen = query.shape[-2] * key.shape[-2] * (0.5 if kwargs.get("is_causal") else 1.0)
        each_way = int(2 * query.shape[:-2].numel() * seen * (query.shape[-1] + value.shape[-1]))
        # Two products on the way forward; on the way back those of the scores again, and two for each of their gradients.
        live.attention_flops += each_way * (7 if query.requires_grad else 2) // 2
        output: Tensor = _Attention.apply(query, key, value, shape.path == "fused" and is_blocked(query, shape.length))
        return output

    # Not a TorchFunctionMode: those are off where a checkpoint computes a layer again.
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = own


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_blocked: bool) -> Tensor:
        # On the CPU laid out as q is, elsewhere with heads inside tokens: whether the next reshape copies it depends on that.
        output = (
            torch.empty_like(q)
            if device_kind(q.device) == "cpu"
            else torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        )
        output = output if v.shape[-1] == q.shape[-1] else q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.is_blocked = is_blocked
        ctx.save_for_backward(q, k, v, output, *(() if is_blocked else (q.new_empty(q.shape[:-1], dtype=torch.float32),)))
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *_ = ctx.saved_tensors
        # Luthier's blocks copy what they read so that the heads of one key lie side by side, and what they write back.
        copies = [torch.empty_like(each) for each in (q, output, upstream, q, k, v, k, v)] if ctx.is_blocked else []
        gradients = tuple(torch.empty_like(each) for each in (q, k, v))
        del copies
        return *gradients, None


@contextmanager
def kept_blocks(own: Iterable[Tensor], on_kept: Callable[[int], None] | None = None) -> Iterator[dict[int, int]]:
    """Inside the block, note what autograd keeps for the backward pass: address of its memory -> bytes.

    By memory, since several views of one are kept once; memory of the tensors `own` (a model's parameters) does not count.
    A weight in 4 bits is always the model's: read back, it is never kept. `on_kept` is told each address as it is noted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in own if not isinstance(tensor, PackedTensor)}
    alive: list[Tensor] = []  # else the next tensor may come to lie at the address of one that is gone
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if isinstance(tensor, PackedTensor):
            return tensor.detach()
        block = tensor.untyped_storage()
        if block.data_ptr() not in known:
            found[block.data_ptr()] = block.nbytes()
            # Detached, since a graph that holds its own output is never freed.
            alive.append(tensor.detach())
            if on_kept is not None:
                on_kept(block.data_ptr())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield found
