"""nn.MultiheadAttention: folders travel both ways. PEFT 0.21 adds the output projection's update twice, luthier once."""

from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from tests.parity.cases import randomise, relative
from torch import Tensor, nn

from luthier.adapt.attaching import attach
from luthier.core.config import LoraConfig
from luthier.formats.adapters import load_adapter, save_adapter

SETTINGS = {"r": 3, "lora_alpha": 7, "target_modules": ["mix", "last"]}


class Mixer(nn.Module):
    """Attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(5, 12), nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(self.mix(hidden, hidden, hidden, need_weights=False)[0])


def base() -> nn.Module:
    torch.manual_seed(3)
    return Mixer().eval()


def theirs(folder: Path | None = None) -> nn.Module:
    if folder is not None:
        return peft.PeftModel.from_pretrained(base(), folder).eval()
    return peft.get_peft_model(base(), peft.LoraConfig(**SETTINGS)).eval()


def once(model: nn.Module) -> nn.Module:
    """Halve PEFT's second factor of the output projection, which it counts twice."""
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if "out_proj.lora_B" in key).mul_(0.5)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 50).view(2, 5, 5))


def test_peft_written_loads_in_ours_and_goes_back_bit_equal(tmp_path: Path) -> None:
    live = theirs()
    randomise(live)
    live.save_pretrained(tmp_path / "peft")
    model = base()
    load_adapter(model, tmp_path / "peft")
    save_adapter(model, tmp_path / "ours")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("peft", "ours"))
    assert len(one) == 6 and one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert relative(output(model), output(once(live))) <= 1e-5
    assert relative(output(base()), output(model)) > 1e-2


def test_ours_loads_in_peft(tmp_path: Path) -> None:
    live = base()
    attach(live, LoraConfig(**SETTINGS))
    randomise(live)
    save_adapter(live, tmp_path / "ours")
    model = theirs(tmp_path / "ours")
    result = model.load_adapter(tmp_path / "ours", "default")
    assert not result.missing_keys and not result.unexpected_keys
    assert relative(output(once(model)), output(live)) <= 1e-5


def test_one_seed_gives_the_same_start_in_both() -> None:
    live = theirs()
    model = base()  # either adapter is drawn right after this
    attach(model, LoraConfig(**SETTINGS))
    pair, wrapped = model.mix.lora["default"], live.base_model.model.mix
    assert torch.equal(pair.lora_A, wrapped.lora_A["default"].weight)
    assert torch.equal(pair.out.lora_A, wrapped.base_layer.out_proj.lora_A["default"].weight)
    assert not pair.out.lora_B.any() and not pair.lora_B.any()
