"""The first thing that a new user runs, on the real small model: shortened, but through every part."""

import json
from pathlib import Path

import pytest
from tests.tiny_run import run_luthier


@pytest.mark.slow
def test_quickstart_runs_through_and_proves_what_it_says(smollm2: Path, tmp_path: Path) -> None:
    done = run_luthier("quickstart", "--max-steps", "3", "--limit", "4", "--dtype", "float32", "--json", cwd=tmp_path, threads=2)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reload_is_exact"] is True
    assert found["unmerge_is_exact"] is True
    assert found["merge_relative_difference"] < 1e-4
    assert found["summary"]["steps"] == 3
    assert found["judgement"]["rows"] == 4
    assert found["adapter_exact_match"] == found["judgement"]["adapter"]["exact"]["value"]
    adapter = tmp_path / found["summary"]["adapter"] / "adapter_model.safetensors"
    assert adapter.stat().st_size == found["summary"]["adapter_bytes"]
    for chapter in ("1. the task", "2. train an adapter", "3. base and adapter", "4. what was made", "5. next"):
        assert chapter in done.stderr
