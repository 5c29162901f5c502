"""keep_torch_out(): a process that handles text only, and never loads torch."""

import sys


def keep_torch_out() -> bool:
    """Have `import torch` fail in this process from now on, unless it is there already; return whether it is kept out.

    transformers loads torch wherever it is installed, for a tokenizer too, and does without where it is not: to it this looks so.
    """
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's own way to say that there is none
    return sys.modules["torch"] is None
