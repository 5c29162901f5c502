"""Adapters for tests of the engine: real folders for a tiny model, told apart by a seed, and damage that disks and people do."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.adapt import adapter_parameters, attach
from luthier.core.config import LoraConfig
from luthier.formats.adapters import save_adapter

TENSORS = "adapter_model.safetensors"


def save_random_adapter(folder: Path, model: nn.Module, seed: int = 0, **config: object) -> Path:
    """Save an adapter of random numbers for `model`, to which it stays attached; arguments are LoraConfig's."""
    torch.manual_seed(seed)
    attach(model, LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"]} | config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in adapter_parameters(model, "default"):
            item.parameter.add_(0.2 * torch.randn(item.parameter.shape, generator=generator).to(item.parameter.dtype))
    return save_adapter(model, folder)


def cut_short(folder: Path) -> None:
    """Lose the last bytes of the tensors, as a copy that was interrupted does."""
    raw = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(raw[: len(raw) - 100])


def flip_bit(file: Path, place: int = -9) -> None:
    """Change one bit of a file, as a failing disk does."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.chmod(0o644)
    file.write_bytes(raw)


def put_nan(folder: Path) -> None:
    """Let one number be NaN, in a folder as PEFT writes it: there is no digest that would tell first."""
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / "luthier.json").unlink(missing_ok=True)


def lose_tensors(folder: Path) -> None:
    """Lose the file with the tensors."""
    (folder / TENSORS).unlink()


def poison(folder: Path) -> None:
    """Change the numbers behind the back of the note that has their digest."""
    tensors = load_file(folder / TENSORS)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, folder / TENSORS, {"format": "pt"})
