"""What a result was made with: versions of the packages that decide numbers, Python, the platform. Loads none of them."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from luthier import __version__
from luthier.core.processor import fast_bf16_unit

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "bitsandbytes")


def environment() -> dict[str, Any]:
    """Return versions and platform as plain JSON; a package that is not installed is left out."""
    found = {"luthier": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "packages": found,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "bf16_unit": fast_bf16_unit(),
    }
