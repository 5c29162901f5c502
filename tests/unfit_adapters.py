"""Adapters that vLLM would serve wrongly or not at all, each as PEFT or luthier writes it, with a word of the reason."""

import copy
import json
import warnings
from pathlib import Path

import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.engine_scene import save_peft_adapter
from tests.served_adapters import TENSORS, save_random_adapter
from torch import nn

from luthier.adapt import detach

MAX_RANK = 16
QV = ["q_proj", "v_proj"]
UNSOUND = ("empty", "false_rank", "half")
"""Kinds that the registry itself does not take."""
KINDS = (
    *("adalora", "bias", "dora", "elsewhere", "embeddings", "head", "high_rank", "lora_bias", "narrow", "one_high_rank"),
    *("other_base", "saved_whole", "stranger", "tokens"),
)


def unfit_folders(
    model: torch.nn.Module, other: torch.nn.Module, smaller: torch.nn.Module, place: Path
) -> dict[str, tuple[Path, str]]:
    """Return kind -> (folder, words of the reason), for serving on `model` with at most MAX_RANK.

    `other` has other weights than `model`, `smaller` has narrower layers of the same names.
    """

    def peft(kind: str, **config: object) -> Path:
        return save_peft_adapter(model, place / kind, 7, **{"r": 4, "target_modules": QV} | config)

    made = {
        "dora": (peft("dora", use_dora=True), "use_dora"),
        "bias": (peft("bias", bias="lora_only"), "bias='lora_only'"),
        "lora_bias": (peft("lora_bias", lora_bias=True), "lora_bias"),
        "saved_whole": (peft("saved_whole", modules_to_save=["lm_head"]), "modules_to_save"),
        "tokens": (peft("tokens", trainable_token_indices=[3, 5]), "trainable_token_indices"),
        "embeddings": (peft("embeddings", target_modules=[*QV, "embed_tokens"]), "embeddings or the output head"),
        "head": (peft("head", target_modules=[*QV, "lm_head"]), "embeddings or the output head"),
        "high_rank": (peft("high_rank", r=MAX_RANK + 4), "max_lora_rank=32"),
        "one_high_rank": (peft("one_high_rank", rank_pattern={"v_proj": 513}), "no room for more than 512"),
        "narrow": (save_peft_adapter(smaller, place / "narrow", 7, r=4, target_modules=QV), "do not fit this base"),
        "adalora": (save_adalora(model, place / "adalora"), "AdaLoRA"),
        "empty": (peft("empty"), "no tensors"),
        "elsewhere": (peft("elsewhere"), "not in this base"),
        "half": (peft("half"), "has no lora_B"),
        "false_rank": (peft("false_rank"), "needs (5, "),
        "stranger": (peft("stranger"), "knows no such tensors"),
    }
    save_random_adapter(place / "other_base", other, target_modules=QV)
    detach(other)
    made["other_base"] = (place / "other_base", "another base")
    _rewrite(made["empty"][0], lambda tensors: {})
    _rewrite(
        made["elsewhere"][0], lambda tensors: {key.replace("layers.1.", "layers.99."): each for key, each in tensors.items()}
    )
    _rewrite(
        made["half"][0], lambda tensors: {key: each for key, each in tensors.items() if "1.self_attn.v_proj.lora_B" not in key}
    )
    _rewrite(made["stranger"][0], lambda tensors: tensors | {"base_model.model.model.norm.weight": torch.ones(4)})
    config = json.loads((made["false_rank"][0] / "adapter_config.json").read_text())
    (made["false_rank"][0] / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
    return made


def save_adalora(model: nn.Module, folder: Path) -> Path:
    """Have PEFT write an AdaLoRA adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), AdaLoraConfig(target_modules=QV, total_step=9, init_r=4, target_r=4))
        wrapped.save_pretrained(folder)
    return folder


def _rewrite(folder: Path, change) -> None:
    save_file(change(load_file(folder / TENSORS)), folder / TENSORS, {"format": "pt"})
