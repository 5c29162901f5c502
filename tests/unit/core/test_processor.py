"""What a processor multiplies fast is read from what the system says of it."""

import pytest

from luthier.core.processor import fast_bf16_unit


@pytest.mark.parametrize(
    ("line", "unit"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("flags : fpu avx512f avx512_bf16", "AVX512-BF16"),
        ("Features\t: fp asimd bf16 i8mm", "the Arm bf16 extension"),
        ("flags : fpu avx2 avx512f amx_tile", None),
        ("model name : avx512_bf16", None),
        ("", None),
    ],
)
def test_the_unit_is_read_from_the_flags_line_only(tmp_path, line, unit):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\n{line}\n\nprocessor : 1\n")
    assert fast_bf16_unit(cpuinfo) == unit


def test_a_system_without_cpuinfo_counts_as_without_unit(tmp_path):
    assert fast_bf16_unit(tmp_path / "absent") is None
