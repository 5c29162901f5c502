"""A 4-bit weight as named tensors: the way there and back, and what is refused with all its faults."""

import json

import pytest
import torch
from torch import Tensor

from luthier.core.errors import ModelError
from luthier.quant import dequantize_nf4, from_keys, quantize_nf4, to_keys
from luthier.quant.keys import STATE


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_there_and_back_is_bit_exact(double: bool, dtype: torch.dtype) -> None:
    stored = quantize_nf4(torch.randn(37, 51), double=double).to(torch.device("cpu"), dtype)
    back = from_keys(to_keys(stored))
    assert back.shape == stored.shape
    assert back.dtype == dtype
    for name, tensor in stored.tensors.items():
        assert torch.equal(back.tensors[name], tensor), name
    assert torch.equal(dequantize_nf4(back), dequantize_nf4(stored))


def changed(**others: Tensor) -> dict[str, Tensor]:
    return to_keys(quantize_nf4(torch.randn(37, 51))) | others


def test_what_is_missing_is_named() -> None:
    tensors = changed()
    del tensors["absmax"], tensors[STATE]
    with pytest.raises(ModelError, match=rf"absmax, {STATE} not there"):
        from_keys(tensors)


@pytest.mark.parametrize(
    ("others", "fault"),
    [
        ({"": torch.zeros(9, 1, dtype=torch.uint8)}, r"9 codes of torch.uint8 for \(37, 51\), not 944 bytes"),
        ({"absmax": torch.zeros(30)}, "absmax has 30 numbers of torch.float32, for 30 blocks of 64"),
        ({"quant_map": torch.linspace(-1, 1, 16)}, "quant_map is not NF4's"),
        ({"nested_quant_map": torch.linspace(-1, 1, 256)}, "nested_quant_map is not the usual one"),
        ({"nested_absmax": torch.zeros(2)}, "nested_absmax has 2 numbers"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(others: dict[str, Tensor], fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        from_keys(changed(**others))


@pytest.mark.parametrize("text", ["no json", "{}", json.dumps({"shape": [2], "dtype": "nothing", "blocksize": 64}), "[]"])
def test_a_state_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        from_keys(changed(**{STATE: torch.tensor(list(text.encode()), dtype=torch.uint8)}))
