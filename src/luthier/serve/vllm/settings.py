"""What is said about vLLM when a gateway starts it."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from luthier.core.settings import Settings
from luthier.serve.vllm.checking import RANKS

PYTHON = "LUTHIER_VLLM_PYTHON"
"""Environment: the python of vLLM's own environment."""


class VllmSettings(Settings):
    """How vLLM is started. What is not said is as vLLM has it."""

    python: Path | None = Field(
        default=None, description="python of an environment with vLLM and luthier; left out, that in LUTHIER_VLLM_PYTHON"
    )
    dtype: str = Field(default="auto", description="vLLM's --dtype: what the base and its adapters are multiplied in")
    max_running: int = Field(default=32, ge=1, description="requests that are answered at a time (vLLM's --max-num-seqs)")
    max_loras: int = Field(default=8, ge=1, description="different adapters in one batch")
    max_cpu_loras: int = Field(default=64, ge=1, description="adapters that vLLM keeps in memory; the longest unused one goes")
    max_lora_rank: int | None = Field(
        default=None,
        description="largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512; left out, what the "
        "registry's versions need now, and at least 16",
    )
    max_model_len: int | None = Field(default=None, ge=1, description="tokens of a prompt and its answer together")
    kv_gib: int = Field(default=2, ge=1, description="on a CPU: memory for keys and values (VLLM_CPU_KVCACHE_SPACE), in GiB")
    network: Literal["auto", "none", "host"] = Field(
        default="auto",
        description="none: vLLM runs in a network namespace with nothing but its own loopback; host: in the machine's; auto: "
        "none where the kernel allows it and the registry is not reached over a network",
    )
    start_seconds: float = Field(default=1800.0, gt=0, description="how long vLLM may take until it answers")
    stop_seconds: float = Field(default=15.0, ge=0, description="how long it may take to end before it is killed")
    more: tuple[str, ...] = Field(default=(), description="further words of vLLM's command line: --tensor-parallel-size 2")

    @property
    def program(self) -> Path:
        """The python that is meant; without a name where none is given."""
        return self.python or Path(os.environ.get(PYTHON, ""))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_lora_rank is not None and self.max_lora_rank not in RANKS:
            raise ValueError(f"max_lora_rank is {self.max_lora_rank}; vLLM takes {', '.join(map(str, RANKS))}")
        if self.max_cpu_loras < self.max_loras + 1:
            raise ValueError(
                f"max_cpu_loras is {self.max_cpu_loras}; it must be above max_loras ({self.max_loras}), since the bare base "
                "has a place too"
            )
        return self
