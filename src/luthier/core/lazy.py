"""Lazy public names for package `__init__` files (PEP 562), so that `luthier --help` loads no torch."""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return `(__getattr__, __all__)` for a package whose public names live in other modules.

    `homes` maps each public name to the absolute module that defines it; the module is imported at first use.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return __getattr__, sorted(homes)
