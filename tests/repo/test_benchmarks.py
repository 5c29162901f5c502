"""The benchmarks run, tiny, so that their defaults cannot rot; what they measure is not looked at here."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tests.tiny_run import save_tiny_model

ROWS = [
    {"text": f"put song {n} on my list", "intent": "AddToPlaylist", "slots": {"song": f"song {n}", "playlist": "my list"}}
    for n in range(9)
]


def test_snips_runs_tiny(root: Path, tmp_path: Path, tiny_llama: Callable[..., torch.nn.Module], tiny_tokenizer: object) -> None:
    save_tiny_model(tmp_path / "model", tiny_llama, tiny_tokenizer)
    for name in ("snips_json_train.jsonl", "snips_json_test.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = [sys.executable, str(root / "benchmarks/snips.py"), "--model", "model", "--data", ".", "--out", "run"]
    run = subprocess.run(
        [*command, "--steps", "2", "--limit", "4"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["steps"] == 2
    assert result["base"]["n"] == result["adapter"]["n"] == 4
