"""A pool of OpenMP threads ends when it is released, and the next parallel product works."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, threading
import torch
from luthier.core.threads import release_thread_pool

torch.set_num_threads(2)
x = torch.randn(400, 400)

def threads():
    return len(os.listdir("/proc/self/task"))

expected = x @ x
with_pool = threads()
release_thread_pool()
without = threads()
assert torch.equal(x @ x, expected)
print(with_pool, without, threads())
# In a thread of its own: only its pool ends.
seen = []
def work():
    x @ x
    before = threads()
    release_thread_pool()
    seen.append((before, threads()))
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*seen[0])
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which only Linux has")
def test_a_released_pool_ends_and_comes_again_when_it_is_needed() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    first, second = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert first[0] == first[1] + 1 == first[2]
    assert second[0] == second[1] + 1
