"""What the process holds and held at most; and that freed memory stays where it is wanted again.

What changes the allocator runs in processes of its own.
"""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from luthier.train import memory
from luthier.train.memory import held_memory, keep_freed_memory, peak_memory, reset_peak_memory, settle_allocator

MIB = 2**20

# Each script is told "keep" or "leave" and prints what it found as JSON. Huge pages are switched off: with them a page fault
# brings 2 MiB instead of 4 KiB.
START = """
import ctypes, json, resource, sys
PR_SET_THP_DISABLE = 41
ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
import torch
from luthier.train.memory import held_memory, keep_freed_memory, peak_memory, reset_peak_memory, settle_allocator

MIB = 2**20
torch.set_num_threads(1)
said = keep_freed_memory() if sys.argv[1] == "keep" else ""

def ones(mib):
    return torch.ones(mib * MIB, dtype=torch.uint8)
"""

PEAK = """
can_reset, before, peak_before = reset_peak_memory(), held_memory(), peak_memory()
block = ones(200)
with_block = held_memory()
del block
without, peak = held_memory(), peak_memory()
reset_peak_memory()
found = {"can_reset": can_reset, "held": before, "with_block": with_block, "without": without}
print(json.dumps(found | {"peak_before": peak_before, "peak": peak, "peak_after": peak_memory()}))
"""

# How much freeing a block gives back, by how much the process still grows when a freed block was asked for many times (aligned
# blocks do not fit their own holes exactly, so it takes a few rounds until there is room), and the page faults of ten tensors of
# 64 MiB one after another.
REUSE = """
block = ones(100)
with_block = held_memory()
del block
freed = with_block - held_memory()
def ask_again(times):
    for _ in range(times):
        block = ones(100)
        del block
    return held_memory()
level = ask_again(40)
grown = ask_again(80) - level
block = ones(100)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16 * MIB)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"said": said, "grown": grown, "freed": freed, "faults": faults}))
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is not glibc's")


def run(script: str, how: str) -> dict:
    """Run a script in a process without a preloaded allocator and return what it found."""
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD" and not key.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START + script, how]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_peak_is_counted_from_the_reset_on() -> None:
    found = run(PEAK, "leave")
    if not found["can_reset"]:
        pytest.skip("this system cannot reset the peak")
    assert abs(found["peak_before"] - found["held"]) < 8 * MIB
    assert 190 * MIB < found["with_block"] - found["held"] < 220 * MIB
    assert abs(found["without"] - found["held"]) < 10 * MIB
    assert 190 * MIB < found["peak"] - found["peak_before"] < 220 * MIB
    assert abs(found["peak_after"] - found["held"]) < 10 * MIB


def test_the_peak_is_never_below_what_is_held() -> None:
    block = torch.ones(30 * MIB, dtype=torch.uint8)
    # The kernel counts resident pages in batches per thread, so either number may be a little behind.
    assert peak_memory() >= held_memory() - 4 * MIB
    assert held_memory() > 30 * MIB
    del block


def test_a_system_without_proc_still_knows_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(memory, "STATUS", memory.Path(str(tmp_path)) / "none")
    monkeypatch.setattr(memory, "CLEAR_REFS", memory.Path(str(tmp_path)) / "none" / "none")
    assert not reset_peak_memory()
    assert peak_memory() >= held_memory() - 4 * MIB


@pytest.fixture(scope="module")
def kept() -> dict:
    """Return what a process found that keeps what it frees."""
    return run(REUSE, "keep")


@on_glibc
def test_what_was_done_is_said_and_freed_memory_is_kept(kept: dict) -> None:
    assert kept["said"] == "freed blocks up to 1 GiB are kept for reuse (mallopt)"
    assert kept["freed"] < 5 * MIB


@on_glibc
def test_kept_memory_levels_off(kept: dict) -> None:
    assert kept["grown"] < 105 * MIB


@on_glibc
def test_kept_memory_is_not_paged_in_anew(kept: dict) -> None:
    usual = run(REUSE, "leave")
    assert usual["freed"] > 95 * MIB, "this allocator keeps it anyway: nothing was compared"
    assert usual["grown"] < 5 * MIB
    assert usual["faults"] > 0.9 * 10 * 64 * MIB / os.sysconf("SC_PAGE_SIZE")
    assert kept["faults"] * 10 < usual["faults"]


@pytest.mark.parametrize("library", ["libtcmalloc.so.4", "libjemalloc.so.2"])
@on_glibc
def test_a_preloaded_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setattr(memory, "_loaded", lambda: f"7f00-7f01 r-xp 0 08:01 1 /usr/lib/{library}\n")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("mallopt was called"))
    assert keep_freed_memory() == "left to the preloaded allocator"


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("mallopt was called"))
    assert keep_freed_memory() == "left to the system's allocator"


def test_memory_is_kept_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: "kept")
    monkeypatch.setattr(memory, "fast_bf16_unit", lambda: "AMX")
    assert settle_allocator() == "kept"
    assert settle_allocator("cuda").startswith("left as it is")
    monkeypatch.setattr(memory, "fast_bf16_unit", lambda: None)
    assert settle_allocator().startswith("left as it is")


def test_who_saves_memory_gets_it_back_where_there_are_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "give_back_large_blocks", lambda: "given back")
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: "kept")
    monkeypatch.setattr(memory, "fast_bf16_unit", lambda: None)
    assert settle_allocator(saves_memory=True) == "given back"
    monkeypatch.setattr(memory, "fast_bf16_unit", lambda: "AMX")
    assert settle_allocator(saves_memory=True) == "kept"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
def test_a_large_block_that_is_free_is_the_kernels_again() -> None:
    program = (
        "import torch; from luthier.train.memory import give_back_large_blocks, held_memory\n"
        "kept = [torch.ones(2**20) for _ in range(3)]\n"  # 4 MiB each
        "del kept; print(give_back_large_blocks())\n"
        "before = held_memory(); blocks = [torch.ones(2**20) for _ in range(20)]; stays = torch.ones(2**20)\n"
        "full = held_memory(); del blocks; print(full - before, held_memory() - before)"
    )
    lines = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.splitlines()
    full, left = map(int, lines[1].split())
    assert lines[0].startswith("blocks from 2 MiB")
    assert full > 80 * 2**20 and left < 8 * 2**20
