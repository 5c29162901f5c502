"""The cases of PEFT's own tests on custom models: against dense float64 algebra first, against PEFT on the same tensors second.

The oracle is torch's own modules in float64 with the weights written out: W + s B A, or what DoRA, tokens and saved modules make
of them. A convolution with groups becomes one without, whose weight is zero between the groups, since the update is not.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from tests.parity.cases import logits, randomise, relative
from tests.parity.custom_models import APPLIED, CUSTOM_CASES, DOUBLED, MIXED, REFUSED, UNMERGED, CustomCase
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from luthier.adapt import adapter_parameters, attach, detach, disabled, merge, unmerge
from luthier.adapt.state import AdapterParameter
from luthier.core.config import LoraConfig
from luthier.core.errors import AdapterError, AdapterStateError, ConfigError
from luthier.formats.adapters import load_adapter, save_adapter

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PARTS_OF_PEFT: dict[str, Callable[..., Any]] = {
    "kasa_config": peft.KasaConfig,
    "velora_config": peft.VeloraConfig,
    "monteclora_config": peft.MontecloraConfig,
    "use_bdlora": BdLoraConfig,
}
Leaves = dict[tuple[str, str], Tensor]


def named(cases: tuple[CustomCase, ...]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


each_case = named(APPLIED)


@pytest.fixture(autouse=True)
def _one_thread(_same_start: None) -> None:
    """Models this small spend their time waiting for a second thread."""
    torch.set_num_threads(1)


def trained(case: CustomCase) -> nn.Module:
    """Return the base with our adapter, every trained number moved away from its start."""
    model = case.base()
    attach(model, LoraConfig(**case.config))
    randomise(model)
    return model


def leaves_of(model: nn.Module) -> Leaves:
    """Return (path, role or parameter name) -> float64 leaf, for all that an adapter of ours trains."""
    return {name_of(item): item.parameter.detach().double().requires_grad_() for item in adapter_parameters(model)}


def name_of(item: AdapterParameter) -> tuple[str, str]:
    return item.path, item.key if item.role == "whole" else item.role


def dense_base(base: nn.Module) -> nn.Module:
    """Return the base in float64, its convolutions with groups written out over all channels."""
    dense = copy.deepcopy(base).double()
    for path, layer in list(dense.named_modules()):
        if isinstance(layer, CONVOLUTIONS) and layer.groups > 1:
            window = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation")}
            whole = type(layer)(layer.in_channels, layer.out_channels, **window).double()
            own, out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            with torch.no_grad():
                whole.weight.zero_()
                whole.bias.copy_(layer.bias)
                for group in range(layer.groups):
                    rows, columns = (slice(group * size, (group + 1) * size) for size in (out, own))
                    whole.weight[rows, columns] = layer.weight[rows]
            dense.set_submodule(path, whole)
    return dense.requires_grad_(False)


def dense_parameters(case: CustomCase, leaves: Leaves) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return the float64 base, and name -> what the adapter makes of that parameter, with gradients to `leaves`."""
    base = case.base()
    dense, made = dense_base(base), dict[str, Tensor]()
    scaling = case.config["lora_alpha"] / case.config.get("r", 8)
    for path, role in leaves:
        own, leaf, layer = dense.get_submodule(path), leaves[path, role], base.get_submodule(path)
        if role == "lora_A":
            key = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
            made[f"{path}.{key}"] = adapted_weight(layer, own.get_parameter(key), leaves, path, scaling)
        elif role == "out.lora_A":
            change = scaling * leaves[path, "out.lora_B"] @ leaf
            made[f"{path}.out_proj.weight"] = own.get_parameter("out_proj.weight") + change
        elif role == "lora_bias":
            made[f"{path}.bias"] = own.get_parameter("bias") + scaling * leaf
        elif role == "rows":
            (tokens,) = case.settings["trainable_token_indices"].values()
            made[f"{path}.weight"] = own.get_parameter("weight").index_copy(0, torch.tensor(tokens), leaf)
        elif role in ("weight", "bias"):
            made[f"{path}.{role}"] = leaf
    return dense, made


def adapted_weight(layer: nn.Module, weight: Tensor, leaves: Leaves, path: str, scaling: float) -> Tensor:
    """Return W + s B A in the layer's own order of axes, its outputs rescaled by m / n where the adapter is DoRA's."""
    lora_A, lora_B, magnitude = (leaves.get((path, role)) for role in ("lora_A", "lora_B", "magnitude"))
    assert lora_A is not None and lora_B is not None
    groups = getattr(layer, "groups", 1)
    blocks = zip(lora_B.flatten(1).chunk(groups), lora_A.chunk(groups), strict=True)
    delta = scaling * torch.cat([torch.tensordot(B, A, dims=1) for B, A in blocks])
    is_turned = isinstance(layer, (nn.Embedding, Conv1D))
    inner = (weight.T if is_turned else weight) + delta
    if magnitude is not None:
        lengths = inner.detach().square().flatten(1).sum(1).sqrt()
        inner = inner * (magnitude.flatten() / lengths).view(-1, *[1] * (inner.ndim - 1))
    return inner.T if is_turned else inner


def dense_output(case: CustomCase, leaves: Leaves) -> Tensor:
    dense, made = dense_parameters(case, leaves)
    return torch.func.functional_call(dense, made, (case.x.double() if case.x.is_floating_point() else case.x,))


def theirs(case: CustomCase, folder: Path | None = None) -> nn.Module:
    """Return PEFT's model: with what the folder holds, or with an adapter of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about the cases is not what is tested
        if folder is not None:
            return peft.PeftModel.from_pretrained(case.base(), folder).eval()
        config = {key: PARTS_OF_PEFT[key](**value) if key in PARTS_OF_PEFT else value for key, value in case.config.items()}
        return peft.get_peft_model(case.base(), peft.LoraConfig(**config)).eval()


def written_by_peft(case: CustomCase, folder: Path) -> nn.Module:
    """Make, randomise and save an adapter with PEFT, and return the live model."""
    model = theirs(case)
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes the bias of lora_B for a damaged tensor
        model.save_pretrained(folder)
    return model


def counted_once(case: CustomCase, model: nn.Module) -> nn.Module:
    """Halve the factor that PEFT counts twice, where it does."""
    if case.peft == DOUBLED:
        with torch.no_grad():
            next(parameter for key, parameter in model.named_parameters() if "out_proj.lora_B" in key).mul_(0.5)
    return model


def test_these_are_the_cases() -> None:
    assert len(CUSTOM_CASES) == 46 + 2 and len({case.name for case in CUSTOM_CASES}) == len(CUSTOM_CASES)


@each_case
def test_forward_and_gradients_are_the_dense_model(case: CustomCase) -> None:
    model = trained(case)
    leaves = leaves_of(model)
    want, got = dense_output(case, leaves), model(case.x)
    assert relative(got.detach(), want.detach()) <= 1e-6
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream.double())
    for item in adapter_parameters(model):
        name = name_of(item)
        exact = leaves[name].grad
        assert item.parameter.grad is not None and exact is not None and exact.any(), name
        assert relative(item.parameter.grad, exact) <= 1e-5, name
    assert relative(logits(case.base(), case.x), got.detach()) > 1e-3, "the adapter does nothing: nothing was compared"
    still = {id(item.parameter) for item in adapter_parameters(model)}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) not in still)


@each_case
def test_a_fresh_adapter_changes_no_bit(case: CustomCase) -> None:
    model = case.base()
    attach(model, LoraConfig(**case.config))
    assert torch.equal(logits(model, case.x), logits(case.base(), case.x))


@each_case
def test_merged_weights_are_the_dense_ones_and_come_back_bit_for_bit(case: CustomCase) -> None:
    model = trained(case)
    before = {name: parameter.clone() for name, parameter in case.base().named_parameters()}
    unmerged = logits(model, case.x)
    if not case.merges:
        with pytest.raises(AdapterStateError, match="groups"):
            merge(model)
        assert torch.equal(logits(model, case.x), unmerged)
        return
    _, made = dense_parameters(case, leaves_of(model))
    merge(model)
    assert made
    for name, own in before.items():
        if name in made:
            assert relative(model.get_parameter(name).detach(), made[name].detach()) <= 1e-6, name
        else:
            assert torch.equal(model.get_parameter(name), own), name
    assert relative(logits(model, case.x), dense_output(case, leaves_of(model)).detach()) <= 1e-6
    unmerge(model)
    assert all(torch.equal(model.get_parameter(name), own) for name, own in before.items())
    assert torch.equal(logits(model, case.x), unmerged)


@each_case
def test_silenced_and_detached_it_is_the_base_bit_for_bit(case: CustomCase) -> None:
    base, model = case.base(), trained(case)
    expected = logits(base, case.x)
    with disabled(model):
        assert torch.equal(logits(model, case.x), expected)
    assert not torch.equal(logits(model, case.x), expected)
    detach(model)
    assert torch.equal(logits(model, case.x), expected)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@each_case
def test_peft_computes_the_same_with_the_same_tensors(case: CustomCase, tmp_path: Path) -> None:
    live = trained(case)
    save_adapter(live, tmp_path)
    model = theirs(case, tmp_path)
    result = model.load_adapter(tmp_path, "default")
    assert not result.missing_keys and not result.unexpected_keys
    exact = dense_output(case, leaves_of(live)).detach()
    if case.peft == DOUBLED:
        assert relative(logits(model, case.x), exact) > 1e-3, "PEFT counts it once by now: the case needs no note"
    assert relative(logits(counted_once(case, model), case.x), exact) <= 1e-6
    assert relative(logits(live, case.x), logits(model, case.x)) <= 1e-6


@each_case
def test_what_peft_wrote_is_what_it_computes(case: CustomCase, tmp_path: Path) -> None:
    model, live = written_by_peft(case, tmp_path), case.base()
    load_adapter(live, tmp_path)
    expected = logits(counted_once(case, model), case.x)
    assert relative(logits(live, case.x), expected) <= 1e-6
    assert relative(dense_output(case, leaves_of(live)).detach(), expected) <= 1e-6


@named(tuple(case for case in APPLIED if case.merges))
def test_pefts_merge_is_the_dense_one_too(case: CustomCase, tmp_path: Path) -> None:
    live = trained(case)
    save_adapter(live, tmp_path)
    _, made = dense_parameters(case, leaves_of(live))
    model = counted_once(case, theirs(case, tmp_path))
    if case.peft == UNMERGED:
        with pytest.raises(RuntimeError, match="size of tensor"):
            model.merge_and_unload()
        return
    merged = model.merge_and_unload()
    for name, exact in made.items():
        assert relative(merged.get_parameter(name).detach(), exact.detach()) <= 1e-6, name


def test_one_seed_drops_the_same_numbers_in_both(tmp_path: Path) -> None:
    (case,) = (case for case in APPLIED if "lora_dropout" in case.settings)
    live = trained(case).train()
    save_adapter(live, tmp_path)
    outputs = []
    for model in (live, theirs(case, tmp_path).train()):
        torch.manual_seed(5)
        outputs.append(logits(model, case.x))
    assert relative(*outputs) <= 1e-6
    assert relative(outputs[0], logits(live.eval(), case.x)) > 1e-3


@named(REFUSED)
def test_what_is_not_here_is_refused_by_name(case: CustomCase) -> None:
    model = case.base()
    with pytest.raises(ConfigError, match=case.refused):
        attach(model, LoraConfig(**case.config))
    assert [type(module) for module in model.modules()] == [type(module) for module in case.base().modules()]


@named(tuple(case for case in REFUSED if not case.reads))
def test_a_folder_of_another_method_is_not_read_as_plain_lora(case: CustomCase, tmp_path: Path) -> None:
    written_by_peft(case, tmp_path)
    model = case.base()
    with pytest.raises(AdapterError, match=case.refused):
        load_adapter(model, tmp_path)
    assert [type(module) for module in model.modules()] == [type(module) for module in case.base().modules()]


@named(tuple(case for case in REFUSED if case.reads))
def test_a_folder_that_holds_plain_lora_is_read_however_it_was_trained(case: CustomCase, tmp_path: Path) -> None:
    """What is special in these happens in training: which numbers have gradients, how those are formed, what shakes lora_A."""
    expected = logits(written_by_peft(case, tmp_path / "peft"), case.x)
    live = case.base()
    load_adapter(live, tmp_path / "peft")
    assert relative(dense_output(case, leaves_of(live)).detach(), expected) <= 1e-6
    assert relative(logits(live, case.x), expected) <= 1e-6
    assert relative(logits(case.base(), case.x), expected) > 1e-3
    save_adapter(live, tmp_path / "ours")
    assert relative(logits(theirs(case, tmp_path / "ours"), case.x), expected) <= 1e-6


@named(tuple(case for case in REFUSED if case.peft == MIXED))
def test_why_dora_with_groups_is_refused(case: CustomCase, tmp_path: Path) -> None:
    """PEFT's output is not that of outputs whose length is the magnitude, so its folders mean something that is no DoRA."""
    model = written_by_peft(case, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    keys = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
    leaves = {("conv", role): stored[f"base_model.model.conv.{key}"].double() for role, key in keys.items()}
    assert relative(logits(model, case.x), dense_output(case, leaves)) > 1e-2
    own = case.base().conv.weight.detach().double()
    product = leaves["conv", "lora_B"].view(-1, 8) @ leaves["conv", "lora_A"].flatten(1)  # r=8: a row for each group of outputs
    mixed = (own + 12 / 8 * product.view(own.shape)).flatten(1).norm(dim=1)
    magnitude = leaves.pop(("conv", "magnitude")).flatten()
    lengths = dense_parameters(case, leaves)[1]["conv.weight"].flatten(1).norm(dim=1)
    assert relative(mixed, lengths) > 1e-2
    leaves["conv", "magnitude"] = magnitude / mixed * lengths
    assert relative(logits(model, case.x), dense_output(case, leaves)) <= 1e-6
