"""A pool of OpenMP threads ends when it is released, and the next parallel product works."""

import os
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
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120, check=True)
    first, second = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert first[0] == first[1] + 1 == first[2]
    assert second[0] == second[1] + 1


ENGINE = """
import os, threading, time
from types import SimpleNamespace
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from luthier.engine import Engine

torch.set_num_threads(2)
sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=2000, eos_token_id=1, bos_token_id=0, pad_token_id=2, **sizes)).eval()

def threads():
    return len(os.listdir("/proc/self/task"))

with Engine(model, SimpleNamespace(eos_token_id=1)) as engine:
    idle = threads()
    asking = threading.Thread(target=lambda: engine.score([([0], list(range(3, 400)))] * 20))
    asking.start()
    busy = 0
    while asking.is_alive():
        busy = max(busy, threads())
    end = time.monotonic() + 10
    while threads() > idle and time.monotonic() < end:
        time.sleep(0.01)
    print(idle, busy, threads())
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc, which only Linux has")
def test_an_engine_that_waits_keeps_no_pool() -> None:
    run = subprocess.run([sys.executable, "-c", ENGINE], capture_output=True, text=True, timeout=120, check=True)
    idle, busy, after = map(int, run.stdout.split())
    assert busy > idle + 1, "the thread that asks and the engine's pool"
    assert after == idle
