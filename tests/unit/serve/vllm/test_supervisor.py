"""The life of a supervised process, with a program in vLLM's place; tests/vllm does the same to the real one."""

import asyncio
import json
import os
import signal
import stat
from pathlib import Path

import pytest
from tests.unit.serve.vllm.stand_in import write_stand_in

from luthier.core.errors import ConfigError, EngineError
from luthier.serve.vllm import supervisor as supervising
from luthier.serve.vllm.settings import VllmSettings
from luthier.serve.vllm.supervisor import Supervisor


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Look more often than in earnest."""
    monkeypatch.setattr(supervising, "POLL", 0.02)
    monkeypatch.setattr(supervising, "BEAT", 0.05)
    monkeypatch.setattr(supervising, "SHORTEST", 0.05)


def run(base_folder, script, scene, **settings):
    """Run `scene(supervisor)` over a supervisor, and close it whatever happens."""

    async def go():
        made = Supervisor(
            base_folder, VllmSettings(python=script, stop_seconds=0.5, **settings), max_rank=16, registry="/nowhere/registry"
        )
        try:
            return await scene(made)
        finally:
            await made.close()
            await made.close()
            assert not made.place.folder.exists()

    return asyncio.run(go())


def starts(script: Path) -> list[dict]:
    file = script.parent / "starts"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def until(condition, patience=30.0):
    for _ in range(int(patience / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it did not come to that")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_answers_through_a_socket_that_only_its_user_reaches(base_folder, tmp_path):
    script = write_stand_in(tmp_path)

    async def scene(made):
        assert "not been started" in made.state
        await made.start()
        await made.start()  # the gateway's app does so too
        assert made.state is None and made.is_cpu and made.generation == 1
        assert stat.S_IMODE(made.place.folder.stat().st_mode) == 0o700
        assert (await made.client.get("/health")).status_code == 200
        (start,) = starts(script)
        assert start["environ"]["VLLM_API_KEY"] == made.key and made.key not in str(start["argv"])
        assert json.loads(Path(start["environ"]["LUTHIER_VLLM_BASE"]).read_text())["layers"]
        return start["pid"]

    assert not is_alive(run(base_folder, script, scene))


def test_on_a_gpu_the_base_needs_no_adapter(base_folder, tmp_path):
    script = write_stand_in(tmp_path, cpu=False)

    async def scene(made):
        await made.start()

    run(base_folder, script, scene)
    (start,) = starts(script)
    assert "--lora-modules" not in start["argv"] and "--uds" in start["argv"]


@pytest.mark.parametrize("victim", ["vllm", "keeper"])
def test_after_a_kill_it_says_so_and_is_started_again(base_folder, tmp_path, victim):
    script = write_stand_in(tmp_path)

    async def scene(made):
        await made.start()
        for life in (1, 2):
            pid = starts(script)[-1]["pid"] if victim == "vllm" else made.pid
            os.kill(pid, signal.SIGKILL)
            await until(lambda: made.state is not None)
            assert "ended by signal 9" in made.state
            await until(lambda life=life: made.state is None and made.generation == life + 1)
        assert made.restarts == 2 and len(starts(script)) == 3
        assert [is_alive(start["pid"]) for start in starts(script)] == [False, False, True]

    run(base_folder, script, scene)


def test_one_that_answers_no_more_is_stopped_and_started_again(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(supervising, "PATIENCE", 0.1)
    script = write_stand_in(tmp_path)

    async def scene(made):
        await made.start()
        (tmp_path / "stuck").touch()
        await until(lambda: made.state is not None)
        assert "did not answer 3 times" in made.state
        (tmp_path / "stuck").unlink()
        await until(lambda: made.state is None)

    run(base_folder, script, scene)


def test_one_that_cannot_start_says_why(base_folder, tmp_path):
    script = write_stand_in(tmp_path)
    (tmp_path / "broken").touch()

    async def scene(made):
        with pytest.raises(EngineError, match=r"exit code 1(.|\n)*no room for the KV cache"):
            await made.start()

    run(base_folder, script, scene)


def test_one_that_breaks_later_is_tried_again_and_again(base_folder, tmp_path):
    script = write_stand_in(tmp_path)

    async def scene(made):
        await made.start()
        (tmp_path / "broken").touch()
        os.kill(starts(script)[-1]["pid"], signal.SIGKILL)
        await until(lambda: len(starts(script)) >= 4)
        await until(lambda: "no room for the KV cache" in (made.state or ""))
        (tmp_path / "broken").unlink()
        await until(lambda: made.state is None)

    run(base_folder, script, scene)


def test_while_it_loads_it_says_how_far_it_is(base_folder, tmp_path):
    script = write_stand_in(tmp_path)
    (tmp_path / "stuck").touch()

    async def scene(made):
        task = asyncio.create_task(made.start())
        await until(lambda: "50%" in (made.state or ""))
        (tmp_path / "stuck").unlink()
        await task
        assert made.state is None

    run(base_folder, script, scene)


def test_one_that_takes_too_long_is_given_up(base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(supervising, "PATIENCE", 0.1)
    script = write_stand_in(tmp_path)
    (tmp_path / "stuck").touch()

    async def scene(made):
        with pytest.raises(EngineError, match="did not answer within"):
            await made.start()

    run(base_folder, script, scene, start_seconds=0.3)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"plugin": False}, "plugin is not registered"),
        ({"fault": "ModuleNotFoundError: No module named 'sqlalchemy'"}, "No module named 'sqlalchemy'"),
    ],
)
def test_an_environment_that_lacks_something_is_refused_before_anything_starts(base_folder, tmp_path, found, words):
    script = write_stand_in(tmp_path, **found)

    async def scene(made):
        with pytest.raises(ConfigError, match=words):
            await made.start()

    run(base_folder, script, scene)
    assert starts(script) == []


@pytest.mark.parametrize("python", ["", "/nowhere/python"])
def test_a_python_has_to_be_named(base_folder, python):
    async def scene(made):
        with pytest.raises(ConfigError, match="--vllm-python"):
            await made.start()

    run(base_folder, Path(python), scene)
