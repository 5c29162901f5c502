"""The dtype follows the processor, and the reason says which unit decided."""

from pathlib import Path

import pytest
import torch

from luthier.core.errors import ConfigError
from luthier.models.dtype import choose_dtype


def test_auto_agrees_with_torchs_own_view_of_this_processor():
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu.get_capabilities().get("amx_bf16", False)
    if Path("/proc/cpuinfo").exists() and torch.cpu.get_capabilities().get("architecture") == "x86_64":
        assert choose_dtype("auto").dtype is (torch.bfloat16 if fast else torch.float32)
    assert choose_dtype("auto").reason.startswith(str(choose_dtype("auto").dtype).removeprefix("torch."))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("FP32", torch.float32), ("torch.float16", torch.float16)])
def test_a_requested_dtype_is_taken_as_it_is(name, dtype):
    assert choose_dtype(name).dtype is dtype


def test_an_unknown_dtype_suggests_the_nearest():
    with pytest.raises(ConfigError, match=r"Did you mean .*'bfloat16'"):
        choose_dtype("bloat16")
