"""The inits that begin elsewhere than at zero: the same factors as PEFT's from one seed, and folders that both read.

PEFT writes the residual into the base, luthier keeps the base; what is saved is a plain adapter for the original base.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.incremental_pca import IncrementalPCA
from tests.parity.cases import MakeModel, adamw_curve, logits, randomise, relative
from torch import nn

from luthier.adapt.attaching import attach
from luthier.adapt.state import adapter_parameters
from luthier.core.config import LoraConfig
from luthier.core.inits import RunningPCA
from luthier.formats.adapters import load_adapter, save_adapter
from luthier.formats.keys import item_key

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
INITS = ["orthogonal", "olora", "pissa", "pissa_niter_4"]
CONFIG = {"r": 6, "lora_alpha": 10, "target_modules": ["q_proj", "v_proj", "down_proj"]}
PATTERNS = {"use_rslora": True, "rank_pattern": {"layers.1.*down_proj": 4}, "alpha_pattern": {"q_proj": 3.5}}
each_init = pytest.mark.parametrize("init", INITS)


def both(make_model: MakeModel, config: dict[str, Any]) -> tuple[nn.Module, dict, nn.Module, dict]:
    """Return ours and PEFT's model from one seed, each with its trained tensors by their names on disk."""
    ours, theirs = make_model("llama"), make_model("llama")
    torch.manual_seed(11)
    attach(ours, LoraConfig(**config))
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(theirs, peft.LoraConfig(**config))
    trained = {item_key(item): item.parameter for item in adapter_parameters(ours)}
    expected = {key.replace(".default", ""): value for key, value in theirs.named_parameters() if value.requires_grad}
    assert trained.keys() == expected.keys()
    return ours, trained, theirs, expected


@each_init
@pytest.mark.parametrize("more", [{}, PATTERNS], ids=["plain", "rslora-patterns"])
def test_one_seed_gives_the_same_factors(init: str, more: dict[str, Any], make_model: MakeModel) -> None:
    ours, trained, theirs, expected = both(make_model, CONFIG | more | {"init_lora_weights": init})
    assert all(torch.equal(trained[key], expected[key]) for key in trained)
    assert relative(logits(ours), logits(theirs)) <= 1e-5


@each_init
def test_training_follows_the_residual_form(init: str, make_model: MakeModel) -> None:
    ours, trained, theirs, expected = both(make_model, CONFIG | {"init_lora_weights": init})
    generator = torch.Generator().manual_seed(5)
    batches = [(torch.randint(0, 211, (3, 1), generator=generator) + torch.arange(19)) % 211 for _ in range(4)] * 3
    curves = []
    for model, parameters in ((ours.train(), trained), (theirs.train(), expected)):
        losses = [lambda ids=ids, model=model: model(input_ids=ids, labels=ids).loss for ids in batches]
        curves.append(adamw_curve(parameters.values(), losses))
    assert curves[1][-1] < curves[1][0] - 0.1, "nothing was learnt: nothing was compared"
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) <= 1e-3


@each_init
@pytest.mark.parametrize("more", [{}, PATTERNS], ids=["plain", "rslora-patterns"])
def test_saved_it_is_the_same_function_on_the_original_base_in_both(
    init: str, more: dict[str, Any], make_model: MakeModel, tmp_path: Path
) -> None:
    live = make_model("llama")
    attach(live, LoraConfig(**CONFIG, **more, init_lora_weights=init))
    randomise(live)
    save_adapter(live, tmp_path / "ours", recipe={"step": 3})
    expected = logits(live)
    reloaded = make_model("llama")
    load_adapter(reloaded, tmp_path / "ours")
    assert relative(logits(reloaded), expected) <= 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        theirs = peft.PeftModel.from_pretrained(make_model("llama"), tmp_path / "ours").eval()
    assert relative(logits(theirs), expected) <= 1e-5
    assert relative(logits(make_model("llama")), expected) > 1e-3, "the adapter does nothing: nothing was compared"
    recipe = json.loads((tmp_path / "ours/luthier.json").read_text())["recipe"]
    assert recipe["step"] == 3
    assert recipe["converted"] == {"init_lora_weights": init, "r": 6, "form": "[B | B-B0] [A-A0 ; A0]"}
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["r"] == 12


@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_what_peft_converts_loads_in_ours(init: str, make_model: MakeModel, tmp_path: Path) -> None:
    """PEFT's own conversion, [B | -B0] [A ; A0], is a plain adapter too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**CONFIG, init_lora_weights=init))
        live.peft_config["default"].init_lora_weights = True
        live.save_pretrained(tmp_path / "start")
        live.peft_config["default"].init_lora_weights = init
        randomise(live)
        expected = logits(live.eval())
        live.save_pretrained(tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = make_model("llama")
    load_adapter(model, tmp_path / "peft")
    assert relative(logits(model), expected) <= 1e-5


def test_a_running_pca_finds_the_directions_that_pefts_finds() -> None:
    generator = torch.Generator().manual_seed(2)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    rows = torch.randn(300, 40, generator=generator) * 0.6 ** torch.arange(40) @ turn + torch.randn(40, generator=generator)
    ours, theirs = RunningPCA(6), IncrementalPCA(n_components=6)
    for batch in rows.split(60):
        ours.add(batch)
        theirs.partial_fit(batch)
    cosines = torch.linalg.svdvals(ours.directions(3) @ theirs.components_[:3].T.float())
    assert float(cosines.min()) >= 0.999


def test_olora_turns_a_conv1d_weight_the_right_way_round(make_model: MakeModel) -> None:
    """PEFT decomposes GPT-2's weight as stored, (I, O), so its factors do not fit a layer that is not square."""
    model = make_model("gpt2")
    before = logits(model)
    attach(model, LoraConfig(r=6, target_modules=["c_attn", "c_fc"], init_lora_weights="olora"))
    assert torch.equal(logits(model), before)
    weight = model.transformer.h[0].attn.c_attn.weight.T.double()
    pair = model.transformer.h[0].attn.c_attn.lora["default"]
    Q, R = torch.linalg.qr(weight.detach())
    assert relative((pair.lora_B @ pair.lora_A).detach(), Q[:, :6] @ R[:6]) <= 1e-5
