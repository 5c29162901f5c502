"""vLLM's command line and environment: reachable through one socket, asked with one key, and telling nobody anything.

Also the adapter that changes nothing. In vLLM 0.32 on a CPU a row of the bare base that shares a batch with rows of adapters is
given the numbers of the last slot (index -1 in lora/ops/torch_ops), so there the base is asked for as an adapter of its own,
whose slot holds zeros only. What it adds is exactly nothing, in every dtype. vLLM takes no adapter without tensors, so that it
has one pair of rank 1 for one layer.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from luthier.serve.vllm.checking import PREFIX, Served
from luthier.serve.vllm.guard import KEY
from luthier.serve.vllm.plugin import BASE_FILE, MAX_RANK, NAME
from luthier.serve.vllm.settings import VllmSettings

RAW_BASE = "luthier-raw-base"
"""What vLLM calls the bare base. Neither it nor the next is NAME:VERSION, so no version can have the name."""
ZERO = "luthier-base"
"""What it calls the adapter that changes nothing."""

USUAL = ("o_proj", "down_proj", "out_proj", "dense", "c_proj", "fc2", "wo")
"""Layers that vLLM has under the same name, and not packed with others, in nearly every architecture."""

# What would open another way in, send something out, or change which adapters are found.
DROPPED = ("VLLM_SERVER_DEV_MODE", "VLLM_USE_RUST_FRONTEND", "VLLM_PORT", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_PLUGINS")


@dataclass(frozen=True)
class Place:
    """The folder of one vLLM, which only this user may enter: its socket, its temporary files, and what it is told."""

    folder: Path

    @property
    def socket(self) -> Path:
        """vLLM's one way in."""
        return self.folder / "api"

    @property
    def base_file(self) -> Path:
        """Who is served."""
        return self.folder / "base.json"

    @property
    def temporary(self) -> Path:
        """Where vLLM's processes meet each other."""
        return self.folder / "tmp"


def command(model: Path, place: Place, settings: VllmSettings, max_rank: int, zero: Path | None) -> list[str]:
    """Return vLLM's command line for a base in the folder `model`. `zero` is the adapter for the bare base, if it needs one."""
    words = [str(settings.program), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(model), "--served-model-name", RAW_BASE, "--dtype", settings.dtype]
    words += ["--uds", str(place.socket), "--disable-fastapi-docs", "--disable-uvicorn-access-log"]
    words += ["--middleware", "luthier.serve.vllm.guard.KeyGuard"]
    # One slot more: the bare base, where it is an adapter, takes none from the others.
    slots = settings.max_loras + (zero is not None)
    words += ["--enable-lora", "--max-loras", str(slots), "--max-cpu-loras", str(settings.max_cpu_loras)]
    words += ["--max-lora-rank", str(max_rank), "--max-num-seqs", str(settings.max_running)]
    if zero is not None:
        words += ["--lora-modules", f"{ZERO}={zero}"]
    if settings.max_model_len is not None:
        words += ["--max-model-len", str(settings.max_model_len)]
    # The gateway says all of how to draw, and which tokens end an answer; the model's own file would add to that unseen.
    words += ["--generation-config", "vllm", "--max-logprobs", "50", "--enable-prompt-tokens-details"]
    words += ["--structured-outputs-config", json.dumps({"backend": "guidance"})]
    return [*words, *settings.more]


def environment(
    place: Place, settings: VllmSettings, max_rank: int, key: str, registry: str | None, given: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment vLLM runs in: `given` (this process's) without what would open it, and what closes it."""
    kept = {name: value for name, value in (os.environ if given is None else given).items() if name not in DROPPED}
    told = {
        KEY: key,
        BASE_FILE: str(place.base_file),
        MAX_RANK: str(max_rank),
        "VLLM_PLUGINS": NAME,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(place.temporary),
        "VLLM_RPC_BASE_PATH": str(place.temporary),
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_gib),
        "PYTHONUNBUFFERED": "1",
    }
    if registry is not None:
        told["LUTHIER_REGISTRY"] = registry
    # Several machines under one vLLM have to say themselves by which address they meet.
    near = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return near | kept | told


def write_zero(folder: Path, base: Served) -> Path:
    """Write the adapter that changes nothing of `base` below `folder`, under the digest of its content; return where it is."""
    path = next((path for last in USUAL for path in base.layers if path.endswith(f".{last}")), min(base.layers))
    rows, columns = base.layers[path]
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [path.rpartition(".")[2]], "bias": "none"}
    raw_config = json.dumps(config, sort_keys=True).encode()
    header = {
        f"{PREFIX}{path}.lora_A.weight": {"dtype": "F32", "shape": [1, columns], "data_offsets": [0, 4 * columns]},
        f"{PREFIX}{path}.lora_B.weight": {
            "dtype": "F32",
            "shape": [rows, 1],
            "data_offsets": [4 * columns, 4 * (columns + rows)],
        },
    }
    raw_header = json.dumps(header).encode()
    tensors = struct.pack("<Q", len(raw_header)) + raw_header + bytes(4 * (columns + rows))
    place = folder / f"zero-{sha256(raw_config + tensors).hexdigest()[:16]}"
    place.mkdir(exist_ok=True)
    (place / "adapter_config.json").write_bytes(raw_config)
    (place / "adapter_model.safetensors").write_bytes(tensors)
    return place
