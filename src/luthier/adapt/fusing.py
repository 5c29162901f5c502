"""Fuse the parts of known decoder blocks into fast ones, each compared with the original before it is believed.

Only architectures whose source was read are considered (their attention and norms can hide what a short comparison does not
show: windows, temperatures over position), and of those only modules that give the same numbers as their own forward.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.adapt.state import find_roster
from luthier.adapt.switching import disabled
from luthier.layers.base import FORWARD_HOOKS, AdaptedModule
from luthier.layers.fused import FusedAttention, FusedGatedMLP, FusedModule, FusedNorm, fuse_module, unfuse_module
from luthier.layers.kinds import why_hidden
from luthier.layers.linear import LoraLinear
from luthier.ops.documents import Documents

FUSIBLE = ("llama", "mistral", "qwen2", "qwen3")
"""The model types (`config.model_type`) whose blocks are known."""

PROBE_LENGTHS = (5, 3)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""How far a fused part may be from the original, relative in norm; a part that computes something else is far beyond it."""


@dataclass(frozen=True)
class Fusion:
    """What was fused. `packs`: documents may be packed, since every attention layer keeps them apart.

    `longest`: tokens a document may have there (a sliding window), None where it does not matter. `head_is_plain`: logits are
    the output layer's product with the last hidden states and nothing else, so the loss may be taken from those.
    """

    norms: int = 0
    mlps: int = 0
    attentions: int = 0
    packs: bool = False
    longest: int | None = None
    head_is_plain: bool = False
    reason: str = ""

    def __str__(self) -> str:
        if not self.norms + self.mlps + self.attentions:
            return f"nothing fused: {self.reason}"
        return f"fused: {self.attentions} attentions, {self.mlps} MLPs, {self.norms} norms" + (
            f"; {self.reason}" if self.reason else ""
        )


def fusion_of(model: nn.Module) -> Fusion:
    """Return what `fuse` did to this model."""
    found = vars(model).get("_luthier_fusion")
    return found if isinstance(found, Fusion) else Fusion(reason="fuse() was not called")


def fuse(model: nn.Module) -> Fusion:
    """Fuse what can be fused in a transformers decoder, and say what was. `unfuse` undoes it. Never raises for a model it
    does not know: that one is left alone.
    """
    unfuse(model)
    fusion = _fuse(model)
    object.__setattr__(model, "_luthier_fusion", fusion)
    return fusion


def unfuse(model: nn.Module) -> None:
    """Give every module its own class back."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            unfuse_module(module)
    vars(model).pop("_luthier_fusion", None)


def decoder_of(model: nn.Module) -> nn.Module | None:
    """Return the part of a transformers model that gives the last hidden states, or None."""
    get = getattr(model, "get_decoder", None)
    decoder = get() if callable(get) else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else None


def has_plain_head(model: nn.Module) -> bool:
    """Return whether the logits are the output layer's product with the decoder's last hidden states: tried on four tokens."""
    decoder = decoder_of(model)
    if decoder is None:
        return False
    with _as_it_is(model):
        return _head_is_plain(model, decoder)


def _fuse(model: nn.Module) -> Fusion:
    decoder, config = decoder_of(model), getattr(model, "config", None)
    if decoder is None or config is None:
        return Fusion(reason="it is no transformers decoder")
    with _as_it_is(model):
        head_is_plain = _head_is_plain(model, decoder)
        if getattr(config, "model_type", None) not in FUSIBLE:
            return Fusion(
                head_is_plain=head_is_plain, reason=f"model type {config.model_type!r} is not among {', '.join(FUSIBLE)}"
            )
        counts = {FusedNorm: 0, FusedGatedMLP: 0, FusedAttention: 0}
        replaced_attentions = 0
        for path, module in list(decoder.named_modules()):
            kind = _kind(module)
            # A part that an adapter replaces as a whole is called through its replacement, so both stay as they are.
            is_replaced = isinstance(module, AdaptedModule) or ".replacements." in path
            replaced_attentions += is_replaced and kind is FusedAttention
            if kind is not None and not is_replaced and not _hooked(module) and _agrees(module, kind, decoder):
                fuse_module(module, kind)
                counts[kind] += 1
    others = config.num_hidden_layers - counts[FusedAttention] + replaced_attentions
    reasons = [f"{others} attention layers are not of the known kind, so rows are padded"] if others else []
    reasons += [] if head_is_plain else ["the output layer is not a plain product"]
    return Fusion(
        norms=counts[FusedNorm],
        mlps=counts[FusedGatedMLP],
        attentions=counts[FusedAttention],
        packs=not others,
        longest=getattr(config, "sliding_window", None),
        head_is_plain=head_is_plain,
        reason="; ".join(reasons),
    )


def _kind(module: nn.Module) -> type[FusedModule] | None:
    """Return what a module could be fused as, by its parts; whether it computes the same is asked next."""
    children = {name for name, _ in module.named_children()}
    if type(module).__name__.endswith("RMSNorm") and (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return FusedNorm
    if {"gate_proj", "up_proj", "down_proj"} <= children:
        return FusedGatedMLP
    if {"q_proj", "k_proj", "v_proj", "o_proj"} <= children and "position_embeddings" in inspect.signature(
        module.forward
    ).parameters:
        return FusedAttention
    return None


def _hooked(module: nn.Module) -> bool:
    """Whether a module or one of its layers would notice that its forward is no longer called as it was."""
    for each in (module, *module.children()):
        if any(getattr(each, hooks) for hooks in FORWARD_HOOKS) or why_hidden(each, module):
            return True
    return getattr(module, "attention_dropout", 0.0) != 0.0


def _agrees(module: nn.Module, kind: type[FusedModule], decoder: nn.Module) -> bool:
    """Whether the fused module gives the same numbers on a random input. The random state is left as it was."""
    weight = next(module.parameters())
    if weight.is_meta:
        return True  # no numbers to compare: what is planned takes the word of its architecture
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _frozen(module):  # as in training; what is not frozen is not fused
        torch.manual_seed(0)
        width = weight.shape[-1] if kind is FusedNorm else _width(module, "gate_proj" if kind is FusedGatedMLP else "q_proj")
        x = torch.randn(1, sum(PROBE_LENGTHS), width).to(weight.device, weight.dtype)
        own = module.forward
        try:
            wanted = _attend_apart(own, x, decoder) if kind is FusedAttention else own(x)
            fuse_module(module, kind)
            try:
                found = _attend_packed(module.forward, x, decoder) if kind is FusedAttention else module.forward(x)
            finally:
                unfuse_module(module)  # type: ignore[arg-type]
        except (TypeError, AttributeError, RuntimeError, ValueError):
            return False  # its forward wants something else: not the kind it looked like
    error = float((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30))
    return error <= TOLERANCE.get(weight.dtype, 0.0)


def _attend_apart(forward: Any, x: Tensor, decoder: nn.Module) -> Tensor:
    """Each document alone, through the module's own forward with a mask that any implementation understands."""
    outputs = []
    for part in x.split(PROBE_LENGTHS, dim=1):
        length = part.shape[1]
        mask = torch.full((1, 1, length, length), torch.finfo(x.dtype).min, dtype=x.dtype, device=x.device).triu(1)
        position_ids = torch.arange(length, device=x.device).unsqueeze(0)
        angles = decoder.rotary_emb(part, position_ids)  # type: ignore[operator]
        outputs.append(forward(hidden_states=part, position_embeddings=angles, attention_mask=mask)[0])
    return torch.cat(outputs, dim=1)


def _attend_packed(forward: Any, x: Tensor, decoder: nn.Module) -> Tensor:
    documents = Documents(PROBE_LENGTHS, x.device)
    angles = decoder.rotary_emb(x, documents.position_ids)  # type: ignore[operator]
    output: Tensor = forward(hidden_states=x, position_embeddings=angles, documents=documents)[0]
    return output


def _head_is_plain(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether the model's logits are its output layer's product with the decoder's last hidden states, and nothing more."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if type(head) is not nn.Linear and not isinstance(head, LoraLinear):
        return False
    if head.weight.is_meta:
        return getattr(model.config, "model_type", None) in FUSIBLE
    ids = torch.arange(2, 6, device=head.weight.device).unsqueeze(0) % head.weight.shape[0]
    try:
        wanted, hidden = model(input_ids=ids, use_cache=False).logits, decoder(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(head(hidden), wanted)
    except (TypeError, AttributeError, RuntimeError, ValueError, IndexError):
        return False


def _width(module: nn.Module, child: str) -> int:
    return int(module.get_submodule(child).weight.shape[1])  # type: ignore[index]


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _as_it_is(model: nn.Module) -> Iterator[None]:
    """Outside training, without gradients, with adapters silent: what is compared is the base's own arithmetic."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), disabled(model) if find_roster(model) else nullcontext():
            yield
    finally:
        for module in training:
            module.training = True
