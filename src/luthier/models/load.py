"""From a base model's name to a model and tokenizer ready for adapters, or an error that says what is wrong with it.

Loading is stricter than transformers': a weight the files lack, which transformers would fill with random numbers and a
warning, is an error here. This file never trains, never reads a pickle, and runs a model's own Python code only when asked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ConfigError, ModelError, did_you_mean
from luthier.models.dtype import DtypeChoice, choose_dtype
from luthier.models.fetch import pull
from luthier.models.spec import ModelSpec, parse_spec
from luthier.models.weights import read_entries, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from luthier.layers.packable import Packing

QUANTIZATIONS = ("none", "nf4")


@dataclass(frozen=True)
class LoadedModel:
    """A base model, its tokenizer, and how they came to be."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    path: Path
    spec: ModelSpec
    dtype_choice: DtypeChoice
    packing: "Packing | None" = None
    """What is in 4 bits, if anything is."""


def load_model(
    spec: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "none",
    trust_remote_code: bool = False,
    progress: Callable[[str], None] | None = None,
) -> LoadedModel:
    """Load the base model `spec` for causal language modelling, in eval mode, with scaled-dot-product attention.

    `dtype` "auto" takes what the processor multiplies fast and tells `progress` why; `device` "auto" takes a GPU if there is
    one. `quantize` "nf4" puts the linear layers into 4 bits while they are read, as `quantize_linears` would afterwards; the
    float model is never there as a whole. A folder that holds NF4 weights is read so without being asked.
    Raises: ModelError, and ConfigError for an unknown dtype, device or quantisation, or weights that cannot be in 4 bits.
    """
    if quantize not in QUANTIZATIONS:
        near = did_you_mean(quantize, QUANTIZATIONS)
        raise ConfigError(f"quantize={quantize!r} is unknown.{near} Write {' or '.join(QUANTIZATIONS)}.")
    known = parse_spec(spec)
    place = choose_device(device)
    choice = choose_dtype(dtype, place)
    path = pull(known, progress=progress)
    for file in weight_files(path):
        read_entries(file)
    if progress is not None:
        progress(f"Loading {known} in {choice.reason}")
    model, packing = _read_model(path, choice, trust_remote_code, quantize)
    if progress is not None and packing is not None:
        progress(str(packing))
    return LoadedModel(
        model.to(place).eval(), read_tokenizer(path, trust_remote_code=trust_remote_code), path, known, choice, packing
    )


def base_config(model: "PreTrainedModel") -> dict[str, Any]:
    """Return the model's configuration as plain JSON values, as a fingerprint or a recipe records it."""
    config: dict[str, Any] = model.config.to_dict()
    return config


def choose_device(requested: str) -> str:
    """Return the torch device string for `requested`; "auto" is the GPU where there is one.

    Raises: ConfigError if torch does not know the device or it is not there.
    """
    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(requested).type
    except RuntimeError as error:
        raise ConfigError(f"device {requested!r} is unknown. Write auto, cpu, cuda or cuda:<number>.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {requested!r} was asked for, but torch {torch.__version__} sees no GPU. Write cpu or auto.")
    return requested


def _read_model(
    path: Path, choice: DtypeChoice, trust_remote_code: bool, quantize: str
) -> "tuple[PreTrainedModel, Packing | None]":
    from transformers import AutoConfig, AutoModelForCausalLM

    packing: Packing | None = None
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
        if quantize != "none" or _is_packed(config):
            if trust_remote_code:
                raise ConfigError("a model with code of its own is not read into 4 bits; load it, then quantize_linears(model)")
            from luthier.models.packed import read_packed

            model, report, packing = read_packed(path, config, choice.dtype)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=choice.dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in the report and refused below, with every name
            )
    except (ConfigError, ModelError):
        raise
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        raise ModelError(f"{path} cannot be loaded as a causal language model: {error}") from error
    faults = [f"  {name} is missing" for name in sorted(report["missing_keys"])]
    faults += [f"  {name} is {tuple(given)}, needs {tuple(needed)}" for name, given, needed in sorted(report["mismatched_keys"])]
    faults += [f"  {name} has no place in the model" for name in sorted(report["unexpected_keys"])]
    if faults:
        shown = "\n".join(faults[:20] + ([f"  and {len(faults) - 20} more"] if len(faults) > 20 else []))
        raise ModelError(
            f"The weights in {path} do not fit its config.json ({len(faults)} faults):\n{shown}\nFetch the model again."
        )
    return model, packing


def _is_packed(config: "PreTrainedConfig") -> bool:
    declared: Any = getattr(config, "quantization_config", None)
    return isinstance(declared, dict) and bool(declared.get("load_in_4bit"))


def read_tokenizer(path: Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in a model's folder. Raises: ModelError."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, KeyError, OSError, TypeError, ImportError) as error:
        raise ModelError(f"{path} has no readable tokenizer: {error}") from error
    return tokenizer
