"""Machines a run could be made on and the memory it may take there."""

from dataclasses import dataclass

import psutil

MIB = 2**20


@dataclass(frozen=True)
class Machine:
    """A GPU or a CPU machine. `memory_bytes` is what a run may take, the GPU's own context among it."""

    name: str
    kind: str
    memory_bytes: int


GPUS = tuple(
    Machine(name, "cuda", mib * MIB)
    for name, mib in (
        ("RTX 3060 12 GB", 12_288),
        ("T4 16 GB", 15_360),
        ("L4 24 GB", 23_034),
        ("A10 24 GB", 23_028),
        ("RTX 3090 24 GB", 24_576),
        ("RTX 4090 24 GB", 24_564),
        ("RTX 5090 32 GB", 32_607),
        ("A100 40 GB", 40_960),
        ("L40S 48 GB", 46_068),
        ("A100 80 GB", 81_920),
        ("H100 80 GB", 81_559),
        ("H200 141 GB", 143_771),
    )
)
"""Total memory as nvidia-smi reports it. Source: thundergolfer.com/blog/nvidia-gpu-memory-capacity (T4, L4, A10, L40S, A100,
H100, H200), and listings of nvidia-smi for the RTX cards."""

CPU_SHARE = 0.85
"""Of a CPU machine's memory, so that something is left for the system."""
CPUS = tuple(Machine(f"CPU, {gib} GiB", "cpu", int(gib * 2**30 * CPU_SHARE)) for gib in (8, 16, 32, 64, 128, 256, 512, 1024))


def this_machine() -> Machine:
    """Return this machine, with the memory that is free now."""
    return Machine("this machine, now free", "cpu", psutil.virtual_memory().available)


def process_memory() -> int:
    """Return the bytes a training process has resident besides model and step: Python, torch, transformers, their pages of code.

    Measured on this process, after a step of a tiny model, since code that never ran is not in memory yet.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    ids = torch.zeros(1, 16, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    return int(psutil.Process().memory_info().rss)
