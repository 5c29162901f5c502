"""What this processor multiplies fast. Reads one file of the system's, loads no torch."""

import functools
import re
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
BF16_FLAGS = {
    "amx_bf16": "AMX",  # x86: Intel from Sapphire Rapids on
    "avx512_bf16": "AVX512-BF16",  # x86: Intel from Cooper Lake, AMD from Zen 4 on
    "bf16": "the Arm bf16 extension",
}


@functools.cache
def fast_bf16_unit(cpuinfo: Path = CPUINFO) -> str | None:
    """Return the name of the processor's bf16 matrix unit, or None where it has none (or the system does not say)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return None
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", text, flags=re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return next((unit for flag, unit in BF16_FLAGS.items() if flag in flags), None)
