"""What vLLM tells of itself for metrics, in the words of `Engine.stats`, and what only the gateway's side knows of it."""

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from luthier.engine.requests import Completion

GAUGES = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting", "vllm:kv_cache_usage_perc": "share"}
_LABEL = re.compile(r'(\w+)="([^"]*)"')


class Figures:
    """Counts of one backend: answers, adapters, and the requests that have no token yet."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.loads, self.load_seconds, self.failures = 0, 0.0, 0
        self.bytes: dict[str, int] = {}
        self._waiting: dict[int, float] = {}
        self._number = 0

    def begin(self) -> int:
        """Note a request; returns its number for `first`."""
        self._number += 1
        self._waiting[self._number] = time.monotonic()
        return self._number

    def first(self, number: int) -> None:
        """Note that its first token has come, or that it is over."""
        self._waiting.pop(number, None)

    def ended(self, done: Completion) -> None:
        """Count an answer."""
        self.counts[f"ended_{done.finish_reason}"] += 1
        self.counts["prompt_tokens"] += done.prompt_tokens - done.cached_tokens
        self.counts["cached_tokens"] += done.cached_tokens
        self.counts["new_tokens"] += len(done.token_ids)

    def loaded(self, name: str, seconds: float, num_bytes: int | None) -> None:
        """Count a read of an adapter; without bytes it failed."""
        self.loads += 1
        self.load_seconds += seconds
        if num_bytes is None:
            self.failures += 1
        else:
            self.bytes[name] = num_bytes

    def told(self, states: Mapping[str, str], gauges: Mapping[str, float]) -> dict[str, Any]:
        """Return everything. `states` are the adapters by name, `gauges` what `read_gauges` found.

        Bytes are those of the files: vLLM keeps each adapter at its largest rank, and bounds their number, not their size.
        """
        adapters = [{"name": name, "state": state, "bytes": self.bytes.get(name, 0)} for name, state in sorted(states.items())]
        resident = sum(each["bytes"] for each in adapters if each["state"] == "resident")  # type: ignore[misc]
        store = {"adapters": adapters, "resident_bytes": resident, "limit_bytes": float("inf"), "evictions": 0}
        store |= {"loads": self.loads, "load_seconds": self.load_seconds, "failures": self.failures}
        now = time.monotonic()
        scheduler = {
            "loading": 0,
            "waiting": int(gauges.get("waiting", 0)),
            "prefilling": 0,
            "decoding": int(gauges.get("running", 0)),
            "kv_tokens": int(gauges.get("share", 0.0) * gauges.get("kv_tokens", 0)),
            "longest_wait_seconds": now - min(self._waiting.values(), default=now),
        }
        loading = sum(state == "loading" for state in states.values())
        return {**self.counts, "loading": loading, "scheduler": scheduler, "adapters": store}


def read_gauges(text: str) -> dict[str, float]:
    """Return what of Prometheus' text form of vLLM's figures is of use here; `kv_tokens` is the room for keys and values."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        name = line.partition("{")[0]
        if name in GAUGES:
            found[GAUGES[name]] += float(line.rpartition(" ")[2])  # type: ignore[assignment]
        elif name == "vllm:cache_config_info":
            labels = dict(_LABEL.findall(line))
            sizes = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            found["kv_tokens"] = int(sizes[0]) * int(sizes[1]) if all(size.isdigit() for size in sizes) else 0
    return dict(found)
