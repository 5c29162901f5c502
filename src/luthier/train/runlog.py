"""What stands in a run's folder beside tensors: the names of its files, its log, its status. Loads no torch."""

import json
import platform
import time
from pathlib import Path
from typing import Any

import psutil

CONFIG_FILE, LOG_FILE, SUMMARY_FILE, STATUS_FILE = "config.toml", "run.jsonl", "summary.json", "status.json"
LAYERS_FILE = "layers.jsonl"
ANCHORS, START, TRACKING = "anchors", "start", "tracking"


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return a log's records; a last line that a killed writer left half-written is passed over."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def status_now(status: str, num_steps: int) -> dict[str, Any]:
    """Return what status.json holds: the word, and the process that writes it, so that others can see whether it lives."""
    process = psutil.Process()
    return {
        "status": status,
        "planned_steps": num_steps,
        "time": time.time(),
        "pid": process.pid,
        "started": process.create_time(),
        "host": platform.node(),
    }


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote this status still runs; of another machine's, that cannot be seen and is believed."""
    if status.get("host") != platform.node():
        return True
    try:
        # A number is given again; together with the time at which the process began it is one process.
        return abs(psutil.Process(status["pid"]).create_time() - status["started"]) < 1
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
