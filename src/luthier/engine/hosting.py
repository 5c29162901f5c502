"""What the engine serves: a runner for the base, the store of adapters read for it, and how an adapter becomes active.

An adapter whose pairs can be added to rows of a batch is; one that changes more is merged into a copy of the base, which is then
a decoder of its own; on an architecture that is not known each is attached to the live model. Never decides who runs.
"""

import logging
import tempfile
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.adapt.packing import has_packed_layers
from luthier.core.errors import AdapterStateError, ConfigError
from luthier.core.threads import release_thread_pool
from luthier.engine.adapters import AdapterWeights, ServedBase
from luthier.engine.building import decoder_for
from luthier.engine.decoder import Decoder
from luthier.engine.fallback import FallbackRunner
from luthier.engine.layouts import UnknownLayoutError
from luthier.engine.requests import Mix
from luthier.engine.runner import BASE, Runner
from luthier.engine.store import AdapterStore, RegisteredSource
from luthier.formats.adapters import load_adapter
from luthier.formats.merged import save_merged
from luthier.ops.prepacked import Form

log = logging.getLogger(__name__)


class Host:
    """A base model and its adapters, ready for the engine's steps.

    `form` is that of the base's weights. Adapters that are merged are served from floats whatever it is: to round weights anew
    would take away part of what an adapter changed, which is often less than a step. `reload` gives the base anew where an
    adapter has to be merged; without it such adapters are refused. `slow_because` says why the model is served by its own
    forward, if it is.
    """

    def __init__(
        self,
        model: Any,
        *,
        adapter_bytes: int,
        prefix_bytes: int,
        form: Form = "float",
        registry: Any = None,
        reload: Callable[[], Any] | None = None,
    ):
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        config = model.config.get_text_config()
        self.longest: int | None = getattr(config, "max_position_embeddings", None)
        self.eos_ids = _eos_ids(model)
        self.slow_because: str | None = None
        self.runner: Runner | FallbackRunner
        self._registry, self._reload = registry, reload
        try:
            decoder = decoder_for(model, form)
        except UnknownLayoutError as reason:
            if form != "float" and not (form == "nf4" and has_packed_layers(model)):
                raise ConfigError(
                    f"form={form!r} is there for models that the engine runs itself, and this one runs through its own forward: "
                    f"{reason}. Write form='float'; a base that is in 4 bits stays so"
                ) from reason
            self.slow_because = str(reason)
            log.warning("requests run one by one through the model's own forward: %s", reason)
            base = ServedBase.of(model, places=())  # nothing is batched, so every adapter comes with its folder
            self.runner = FallbackRunner(model)
        else:
            places = [path for projection in decoder.projections for path in projection.paths]
            base = replace(ServedBase.of(model, places=places), weight=_weights_of(model, decoder))
            self.runner = Runner(decoder, prefix_bytes=prefix_bytes)
        self.store = AdapterStore(base, adapter_bytes)

    def add(self, name: str, source: Any, *, force: bool = False) -> "Future[None]":
        """Make an adapter known: a folder (or that of a run), or a Source; with a registry also NAME:VERSION or NAME:ALIAS.

        The future tells when what the name meant before is gone.
        """
        if isinstance(source, str | Path):
            folder = Path(source)
            inner = folder / "adapter"
            if not folder.exists() and self._registry is not None:
                source = RegisteredSource(self._registry, str(source))
            else:
                source = inner if inner.is_dir() else folder
        return self.store.add(name, source, force=force)

    def prepare(self, weights: AdapterWeights) -> Decoder | None:
        """Return the decoder of an adapter that has to be merged, None for all others. Slow: not for the engine's thread."""
        if weights.needs_merge is None or isinstance(self.runner, FallbackRunner):
            return None
        if self._reload is None:
            raise AdapterStateError(
                f"adapter {weights.name!r} has to be merged ({weights.needs_merge}), and this engine has a model from memory: "
                "make the engine with Engine.load, which can read the base again"
            )
        assert weights.folder is not None
        try:
            return self._merged(self._reload(), weights)
        finally:
            release_thread_pool()

    def _merged(self, model: Any, weights: AdapterWeights) -> Decoder:
        assert weights.folder is not None and isinstance(self.runner, Runner)
        load_adapter(model, weights.folder, "served", force=weights.is_forced)
        with tempfile.TemporaryDirectory(prefix="luthier-merged-") as folder:
            path = save_merged(model, Path(folder) / "model")
            del model
            return decoder_for(_read(path, self.runner.decoders[BASE].kept_in).to(self.runner.device))

    def check_mix(self, mix: Mapping[str, float], weights: Mapping[str, AdapterWeights]) -> None:
        """Raise AdapterStateError for what cannot be served together or at a strength."""
        for name, strength in mix.items():
            reason = self._is_alone(weights[name])
            if reason is not None and not (len(mix) == 1 and strength == 1.0):
                raise AdapterStateError(f"adapter {name!r} {reason}, so it is served alone and at strength 1 only")

    def _is_alone(self, weights: AdapterWeights) -> str | None:
        """Why an adapter can neither be scaled nor share a row with others, if so."""
        if self.slow_because is not None:  # attached to the live model, where only what replaces modules is in the way
            replaced = weights.folder.config.modules_to_save if weights.folder is not None else None
            return f"replaces modules whole ({', '.join(replaced)})" if replaced else None
        if any(pair.magnitude is not None for pair in weights.pairs.values()):
            return "is a DoRA adapter"
        return f"has to be merged ({weights.needs_merge})" if weights.needs_merge else None

    def activate(self, weights: AdapterWeights, merged: Decoder | None) -> None:
        """Let rows use an adapter from now on."""
        if isinstance(self.runner, FallbackRunner):
            assert weights.folder is not None
            self.runner.activate_folder(weights.key, weights.folder, force=weights.is_forced)
        elif merged is not None:
            self.runner.activate_merged(weights.key, merged)
        else:
            self.runner.activate(weights.key, weights.rank, weights.pairs)

    def deactivate(self, key: str) -> None:
        """Take an adapter out of the batch, or let its merged copy of the base go."""
        self.runner.deactivate(key)

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop the beginnings of prompts that were computed with other adapters than these."""
        if isinstance(self.runner, Runner) and self.runner.prefix is not None:
            self.runner.prefix.keep_only(keys)

    def close(self) -> None:
        """End the store's workers; a model that was served by its own forward is as before."""
        self.store.close()
        if isinstance(self.runner, FallbackRunner):
            self.runner.leave()


def mix_of(adapter: str | Mapping[str, float] | None) -> dict[str, float]:
    """Return adapters with their strengths: of one name, of several, or of None, the base."""
    if adapter is None:
        return {}
    return {adapter: 1.0} if isinstance(adapter, str) else {name: float(strength) for name, strength in adapter.items()}


def keyed(mix: Mapping[str, float], weights: Mapping[str, AdapterWeights]) -> Mix:
    """Return a mix by content; names of one content add up, and what an adapter gives at strength 0 is left out."""
    summed: dict[str, float] = {}
    for name, strength in mix.items():
        summed[weights[name].key] = summed.get(weights[name].key, 0.0) + strength
    return tuple(sorted((key, strength) for key, strength in summed.items() if strength))


def _weights_of(model: Any, decoder: Decoder) -> Callable[[str], Tensor]:
    """A way to the base's parameters by name once the model is let go: the decoder has the large ones, and the rest is small."""
    paths = [path for projection in decoder.projections for path in projection.paths]
    large = {f"{path}.weight" for path in (*paths, decoder.layout.embedding_path)}
    small = {name: each.detach() for name, each in model.named_parameters() if name not in large}
    return lambda name: small[name] if name in small else decoder.weight(name)


def _read(path: Path, dtype: torch.dtype) -> Any:
    """The model as it was just written; without `load_model`, since there is no tokenizer beside it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", local_files_only=True).eval()


def _eos_ids(model: Any) -> frozenset[int]:
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return frozenset(map(int, ids))
