"""Turn a GGUF file into an ordinary model folder: dequantised safetensors in bfloat16, tokenizer, generation settings.

GGUF records one end-of-sequence token; a chat model needs its end of turn there too, or its answers never stop. The end of
turn is therefore found by rendering the chat template. Blind spot: the pre-tokenizer is the one transformers builds for the
architecture, not the one named by `tokenizer.ggml.pre`.
"""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD_NAMES = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
"""Tokens that may serve as padding where a file names none of its own, first come first taken."""


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in `gguf` into `folder` in the layout of transformers.

    Raises: ModelError if the file is damaged or of an architecture transformers cannot read; MissingExtraError without gguf.
    """
    for package in ("gguf", "accelerate"):  # transformers reads GGUF through both, and says so less clearly
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "gguf", f"Reading {gguf.name}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    check_gguf(gguf)
    source = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        # Said aloud because, where GGUF kernels are installed, transformers would keep the weights packed.
        dequantised = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, quantization_config=dequantised, **source)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, IndexError, TypeError) as error:
        raise ModelError(f"transformers cannot read {gguf}: {error}") from error

    choose_padding(tokenizer)
    stop = stop_token_ids(tokenizer)
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = stop if len(stop) > 1 else stop[0]
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.do_sample = False
    model.generation_config._from_model_config = False  # or a later load would derive it anew from config.json
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_gguf(gguf: Path) -> None:
    """Raise ModelError unless `gguf` begins as a GGUF file and is not one part of a split model."""
    with gguf.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{gguf} is not a GGUF file: it begins with {magic!r}, needed b'GGUF'.")
    if "-of-0" in gguf.name:
        raise ModelError(f"{gguf.name} is one part of a split model. Join the parts first (llama-gguf-split --merge).")


def choose_padding(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Give the tokenizer a padding token other than its end of sequence, where its vocabulary has one.

    Padding with the end of sequence hides that token from losses and embeddings that skip padding, and the model unlearns
    to stop. The vocabulary never grows: that would change the shape of the base.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    vocabulary = tokenizer.get_vocab()
    candidates = [name for name in PAD_NAMES if name in vocabulary and vocabulary[name] != tokenizer.eos_token_id]
    tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token


def stop_token_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the ids that end an answer: the end of sequence, and the chat template's end of turn where it differs."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        mark = "luthier"
        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": mark}]
        after_answer = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
        following = tokenizer(after_answer.lstrip(), add_special_tokens=False)["input_ids"]
        # Not all_special_ids: that lists only the tokens with a role (bos, eos, ...), not every control token.
        control = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        if following and following[0] in control and following[0] not in ids:
            ids.append(int(following[0]))
    if not ids:
        raise ModelError(
            "The GGUF file names no end-of-sequence token, so generation could not stop. Use another copy of the model."
        )
    return ids
