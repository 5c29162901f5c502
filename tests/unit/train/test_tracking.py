"""Each tracker holds the numbers of run.jsonl, read back by its own means; and one that is down changes nothing for the run.

Two legs of one run, which was interrupted and resumed, go to all four trackers at once: a real MLflow server, and the files of
the other three.
"""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import ConfigError, MissingExtraError, TrainingError
from luthier.train.many import train_many
from luthier.train.run import Outcome, resume, train
from luthier.train.settings import RunSettings
from luthier.train.tracking import base
from luthier.train.tracking.base import Record, RunFacts, check_trackers, flattened
from luthier.train.tracking.channel import Channel
from luthier.train.tracking.child import MOST_WAITING, RETRY_SECONDS, Carrier
from luthier.train.tracking.tensorboard import TensorBoard

Make = Callable[..., RunSettings]
Line = dict[str, Any]

ALL = ("mlflow", "tensorboard", "trackio", "wandb")
LONG = 300.0  # on a busy machine a tracker's process takes a while to start
FACTS = RunFacts("refret", "")


# --- a run that goes to all of them ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Tracked:
    """A run in two legs."""

    folder: Path
    legs: tuple[Outcome, Outcome]
    uri: str
    trackio: Path

    @property
    def lines(self) -> list[Line]:
        return [json.loads(line) for line in (self.folder / "run.jsonl").read_text().splitlines()]

    @property
    def points(self) -> dict[str, dict[int, float]]:
        """Figure -> step -> value, of steps and evaluations alike."""
        found: dict[str, dict[int, float]] = {}
        for line in self.lines:
            for key, value in line.items():
                if key != "step":
                    found.setdefault(key, {})[line["step"]] = float(value)
        return found

    def id(self, tracker: str) -> str:
        return json.loads((self.folder / "tracking" / f"{tracker}.json").read_text())["id"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(url: str, **query: str) -> Line:
    with urllib.request.urlopen(f"{url}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start MLflow's server over an SQLite file and return its address."""
    home = tmp_path_factory.mktemp("mlflow")
    port = free_port()
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    words += ["--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts")]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "OMP_NUM_THREADS": "1"}
    with (home / "server.log").open("wb") as said:
        command = [sys.executable, "-m", "mlflow", *words]
        server = subprocess.Popen(command, stdout=said, stderr=said, cwd=home, env=environment, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def interrupt_after(log: Path, lines: int) -> threading.Thread:
    """Send this process one Ctrl-C when the log has so many lines."""

    def watch() -> None:
        while not log.exists() or log.read_bytes().count(b"\n") < lines:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def tracked(settings_in: Make, mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """Return a run that all trackers followed, from its start to a Ctrl-C and from its resumption to its end."""
    home = tmp_path_factory.mktemp("tracked")
    settings = settings_in(
        home / "orders-1",
        train={"epochs": 12, "eval_every": 5, "track": ALL, "track_project": "refrets", "track_patience": LONG, "compile": "off"},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "TENSORBOARD_LOGGING_DIR", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        watcher = interrupt_after(home / "orders-1" / "run.jsonl", 7)
        first = train(settings)
        watcher.join()
        yield Tracked(home / "orders-1", (first, resume(settings.out)), mlflow_server, home / "trackio")


def test_every_tracker_took_both_legs_whole(tracked: Tracked) -> None:
    first, second = (leg.summary for leg in tracked.legs)
    assert (first["ended"], second["ended"]) == ("interrupted", "finished")
    assert 7 <= first["steps"] + first["steps"] // 5 < len(tracked.lines), "the Ctrl-C fell into the run"
    for leg in (first, second):
        assert [each["tracker"] for each in leg["tracking"]] == list(ALL)
        assert [(each["lost"], each["fault"]) for each in leg["tracking"]] == [(0, "")] * 4
    for before, after in zip(first["tracking"], second["tracking"], strict=True):
        assert before["delivered"] + after["delivered"] == len(tracked.lines)
        assert before["id"] == after["id"] == tracked.id(before["tracker"])


def test_mlflow_holds_the_numbers_of_the_log(tracked: Tracked) -> None:
    api, run_id = f"{tracked.uri}/api/2.0/mlflow", tracked.id("mlflow")
    run = ask(f"{api}/runs/get", run_id=run_id)["run"]
    assert {metric["key"] for metric in run["data"]["metrics"]} == set(tracked.points)
    for key, points in tracked.points.items():
        found = ask(f"{api}/metrics/get-history", run_id=run_id, metric_key=key, max_results="10000")["metrics"]
        assert {int(each.get("step", 0)): float(each["value"]) for each in found} == points, key
        assert len(found) == len(points), key
    assert (run["info"]["status"], run["info"]["run_name"]) == ("FINISHED", "orders-1")
    assert ask(f"{api}/experiments/get", experiment_id=run["info"]["experiment_id"])["experiment"]["name"] == "refrets"


def test_mlflow_holds_settings_digests_and_files(tracked: Tracked, mlflow_server: str) -> None:
    api, run_id = f"{tracked.uri}/api/2.0/mlflow", tracked.id("mlflow")
    run = ask(f"{api}/runs/get", run_id=run_id)["run"]
    parameters = {each["key"]: each["value"] for each in run["data"]["params"]}
    assert (parameters["lora.r"], parameters["train.learning_rate"], parameters["objective.kind"]) == ("3", "0.01", "sft")
    tags = {each["key"]: each["value"] for each in run["data"]["tags"]}
    recipe = json.loads((tracked.folder / "adapter" / "luthier.json").read_text())["recipe"]
    assert tags["data.digest"] == recipe["data_digest"]
    assert {role: tags[f"data.digest.{role}"] for role in ("train", "eval")} == recipe["data_digests"]
    assert len(tags["base.fingerprint"]) >= 32
    kept = {each["path"] for each in ask(f"{api}/artifacts/list", run_id=run_id)["files"]}
    assert kept == {"adapter", "loss.png"}
    place = run["info"]["artifact_uri"].removeprefix("mlflow-artifacts:/")
    url = f"{tracked.uri}/api/2.0/mlflow-artifacts/artifacts/{place}/adapter/adapter_model.safetensors"
    with urllib.request.urlopen(url, timeout=60) as answer:
        assert answer.read() == (tracked.folder / "adapter" / "adapter_model.safetensors").read_bytes()


def wandb_records(path: Path) -> Iterator[Any]:
    """Yield the protocol buffers of a .wandb file: LevelDB's log format, read here by its description alone."""
    from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

    raw, block = path.read_bytes(), 32_768
    assert raw[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(raw):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", raw[position : position + 7])
        parts += raw[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield WandbRecord.FromString(parts)
            parts = b""


def test_wandbs_offline_files_hold_the_numbers_of_the_log(tracked: Tracked) -> None:
    files = sorted((tracked.folder / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2, "one for each leg, without a server that could join them"
    found: dict[str, dict[int, float]] = {}
    exit_codes, parameters, artifacts = [], {}, set()
    for record in (record for path in files for record in wandb_records(path)):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            for item in record.history.item:
                key = item.key or ".".join(item.nested_key)
                if not key.startswith("_"):
                    found.setdefault(key, {})[record.history.step.num] = float(json.loads(item.value_json))
        elif kind == "run":
            assert (record.run.run_id, record.run.project) == (tracked.id("wandb"), "refrets")
            parameters |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "exit":
            exit_codes.append(record.exit.exit_code)
        elif kind == "request" and record.request.HasField("log_artifact"):
            artifacts.add(record.request.log_artifact.artifact.type)
        elif kind == "artifact":
            artifacts.add(record.artifact.type)
    assert found == tracked.points
    assert exit_codes == [130, 0]
    assert parameters["train.learning_rate"] == 0.01
    assert parameters["data.digest"] == tracked.legs[1].prepared.rows.digest
    assert artifacts == {"model", "file"}


def test_tensorboards_files_hold_the_numbers_of_the_log_in_float32(tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tracked.folder / "tracking" / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(tracked.points)
    for key, points in tracked.points.items():
        events = found.Scalars(key)
        assert {event.step: event.value for event in events} == {step: float(np.float32(it)) for step, it in points.items()}, key
        assert len(events) == len(points), key
    assert found.Images("loss")[-1].encoded_image_string == (tracked.folder / "loss.png").read_bytes()
    parameters = found.Tensors("parameters/text")[-1].tensor_proto.string_val[0].decode()
    assert "| train.learning_rate | 0.01 |" in parameters
    assert "finished" in found.Tensors("status/text")[-1].tensor_proto.string_val[0].decode()


def test_trackio_holds_the_numbers_of_the_log(tracked: Tracked) -> None:
    # In a process of its own: it looks where its data is when it is imported, and starts threads.
    script = (
        "import json, sys, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage as Storage\n"
        "(run,) = trackio.Api().runs('refrets')\n"
        "logs = Storage.get_logs('refrets', run.name, run_id=run.id)\n"
        "alerts = [each['title'] for each in run.alerts()]\n"
        "print(json.dumps({'name': run.name, 'config': run.config, 'logs': logs, 'alerts': alerts}))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    found: dict[str, dict[int, float]] = {}
    for line in told["logs"]:
        for key, value in line.items():
            if key not in ("step", "timestamp"):
                found.setdefault(key, {})[line["step"]] = float(value)
    assert found == tracked.points
    assert told["name"] == tracked.id("trackio")
    assert told["config"]["train.learning_rate"] == 0.01
    assert sorted(told["alerts"]) == ["run finished", "run interrupted"]
    stored = {path.read_bytes() for path in (tracked.trackio / "artifacts").rglob("*") if path.is_file()}
    assert (tracked.folder / "adapter" / "adapter_model.safetensors").read_bytes() in stored


def test_nothing_of_theirs_is_in_the_process_that_trains() -> None:
    script = (
        "import sys\n"
        "import luthier.train.run\n"
        "from luthier.train.tracking.channel import Channel\n"
        f"print([name for name in {ALL!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- trackers that fail ---------------------------------------------------------------------------------------


def result_of(folder: Path) -> dict[str, Any]:
    """Return what a run made, without clocks."""
    lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
    return {
        "log": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "adapter": {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()},
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


@pytest.fixture(scope="module")
def untracked(settings_in: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of a run that no tracker followed."""
    torch.set_num_threads(2)  # as in every test: the last bits depend on it
    settings = settings_in(tmp_path_factory.mktemp("untracked") / "run", train={"compile": "off"})
    outcome = train(settings)
    assert outcome.summary["tracking"] == []
    return result_of(Path(settings.out))


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Return the address of a server that takes every connection and never says a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_is_not_there_changes_nothing_and_is_told(
    run_settings: Make, untracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    settings = run_settings(train={"track": ["mlflow"], "track_patience": LONG, "compile": "off"})
    (told,) = train(settings).summary["tracking"]
    assert result_of(Path(settings.out)) == untracked
    assert (told["delivered"], told["lost"], told["id"]) == (0, len(untracked["log"]), None)
    assert "Connection refused" in told["fault"] or "Max retries" in told["fault"]


def test_a_server_that_never_answers_is_left_behind(
    run_settings: Make, untracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    settings = run_settings(train={"track": ["mlflow"], "track_patience": 2, "compile": "off"})
    (told,) = train(settings).summary["tracking"]
    assert result_of(Path(settings.out)) == untracked
    assert told["lost"] == len(untracked["log"])
    assert told["fault"].startswith("no answer for 2 s at the end")
    assert json.loads((Path(settings.out) / "tracking" / "mlflow.json").read_text()) == told


def test_sending_never_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent_server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    channel = Channel("mlflow", replace(FACTS, folder=str(tmp_path)), capacity=50)
    # Far more than the queue and the pipe hold; a `send` that waited would wait for ever.
    for step in range(20_000):
        channel.send(Record(step, 0.0, {"loss": 1.0, "lr": 0.5}))
    channel.finish("finished", [])
    report = channel.wait(0.1)
    assert channel.dropped > 10_000
    assert (report.delivered, report.lost) == (0, 20_000)
    assert channel.process.poll() != 0, "it was ended, not waited for"
    assert all(not thread.is_alive() or thread.join(60) is None for thread in channel.threads)


def test_a_tracker_whose_process_dies_is_told(tmp_path: Path) -> None:
    channel = Channel("tensorboard", replace(FACTS, folder=str(tmp_path)))
    channel.kill()
    channel.process.wait()
    channel.send(Record(1, 0.0, {"loss": 1.0}))
    channel.finish("finished", [])
    assert str(channel.wait(LONG)).startswith("tensorboard did not take everything (0 of 1 lines arrived): its process ended")


def test_a_run_that_is_killed_has_failed(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    channel = Channel("tensorboard", replace(FACTS, folder=str(tmp_path)))
    channel.send(Record(1, 0.0, {"loss": 0.25}))
    while channel.delivered == 0:
        time.sleep(0.01)
    assert channel.process.stdin is not None
    os.close(channel.process.stdin.fileno())  # what the kernel does for a process that is gone
    channel.threads[1].join(LONG)
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert found.Scalars("loss")[0].value == 0.25
    assert "| status | failed |" in found.Tensors("status/text")[-1].tensor_proto.string_val[0].decode()
    channel.process.wait()


def statuses(folder: Path) -> list[str]:
    """Return the words that a run's TensorBoard files end with."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tracking" / "tensorboard"))
    found.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("status/text")]
    return [text.split("| status | ")[1].split(" |")[0] for text in texts]


WATCHED = {"track": ["tensorboard"], "track_patience": LONG, "compile": "off"}


def test_a_run_that_fails_has_failed_there_too(run_settings: Make) -> None:
    settings = run_settings(train={"learning_rate": 1e30, "epochs": 9, **WATCHED})
    with pytest.raises(TrainingError):
        train(settings)
    assert statuses(Path(settings.out)) == ["failed"]


def test_runs_over_one_base_are_followed_each_by_itself(run_settings: Make, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs = [run_settings(out=name, train={"max_steps": steps, **WATCHED}) for name, steps in (("one", 2), ("two", 4))]
    outcomes = train_many(runs)
    assert [outcome.summary["tracking"][0]["fault"] for outcome in outcomes] == ["", ""]
    for settings, steps in zip(runs, (2, 4), strict=True):
        folder = Path(settings.out)
        found = EventAccumulator(str(folder / "tracking" / "tensorboard"))
        found.Reload()
        lines = [json.loads(line) for line in (folder / "run.jsonl").read_text().splitlines()]
        logged = [float(np.float32(line["loss"])) for line in lines if "loss" in line]
        assert [event.value for event in found.Scalars("loss")] == logged
        assert len(logged) == steps
        assert statuses(folder) == ["finished"]
        assert json.loads((folder / "status.json").read_text())["status"] == "finished"


def test_a_tracker_that_cannot_be_started_is_told(
    run_settings: Make, untracked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    settings = run_settings(train=WATCHED)
    (told,) = train(settings).summary["tracking"]
    assert "it could not be started" in told["fault"]
    assert result_of(Path(settings.out)) == untracked


class Flaky:
    """A tracker that is away for a while: `faults` is how often it raises before it works."""

    def __init__(self, faults: int):
        self.faults = faults
        self.begun: list[str | None] = []
        self.steps: list[int] = []
        self.status = ""

    def _raise(self) -> None:
        if self.faults:
            self.faults -= 1
            raise ConnectionError("away")

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        self._raise()
        self.begun.append(run_id)
        return "id-1"

    def log(self, records: list[Record]) -> None:
        self._raise()
        self.steps += [record.step for record in records]

    def artifact(self, path: Path) -> None:
        self._raise()

    def finish(self, status: str) -> None:
        self._raise()
        self.status = status


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_a_tracker_missed_is_sent_when_it_is_back(tmp_path: Path) -> None:
    tracker, clock, answers = Flaky(2), Clock(), []
    carrier = Carrier(lambda: tracker, answers.append, clock)
    carrier.begin(FACTS, tmp_path / "note.json", None)
    for step in range(1, 301):
        carrier.take(Record(step, 0.0, {}))
        carrier.try_again()
    assert (tracker.faults, tracker.steps) == (1, []), "asked once, then left in peace for a while"
    clock.now = RETRY_SECONDS
    carrier.try_again()
    clock.now = 2 * RETRY_SECONDS
    carrier.try_again()
    assert tracker.steps == list(range(1, 301))
    assert json.loads((tmp_path / "note.json").read_text()) == {"id": "id-1"}
    report = carrier.finish("finished", [tmp_path])
    assert report == {"id": "id-1", "is_closed": True, "delivered": 300, "lost": 0, "fault": ""}
    assert (tracker.status, tracker.begun) == ("finished", [None])
    assert answers[-1] == {"delivered": 300}


def test_what_waits_for_a_tracker_that_is_down_is_bounded(tmp_path: Path) -> None:
    carrier = Carrier(lambda: Flaky(10**9), lambda answer: None, Clock())
    carrier.begin(FACTS, tmp_path / "note.json", None)
    for step in range(MOST_WAITING + 7):
        carrier.take(Record(step, 0.0, {}))
    assert (len(carrier.waiting), carrier.waiting[0].step) == (MOST_WAITING, 7)
    report = carrier.finish("finished", [])
    assert (report["lost"], report["fault"], report["is_closed"]) == (MOST_WAITING + 7, "ConnectionError: away", False)


def test_tensorboard_takes_back_what_a_killed_run_logged_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    facts = replace(FACTS, folder=str(tmp_path))
    killed = TensorBoard()
    killed.begin(facts, None)
    killed.log([Record(step, 0.0, {"loss": float(step)}) for step in range(1, 7)])
    time.sleep(1.1)  # files are told apart by the second they begin in
    resumed = TensorBoard()
    resumed.begin(replace(facts, step=3), str(tmp_path / "tensorboard"))
    resumed.log([Record(step, 0.0, {"loss": -float(step)}) for step in range(4, 6)])
    resumed.finish("interrupted")
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5)]


# --- settings -------------------------------------------------------------------------------------------------


def test_settings_of_onlookers_change_no_digest_and_no_recipe(run_settings: Make) -> None:
    plain = run_settings()
    watched = run_settings(train={"track": ["wandb"], "track_project": "x", "track_patience": 3, "anchors": 4})
    assert watched.digest() == plain.digest()
    assert run_settings(train={"weight_decay": 0.1}).digest() != plain.digest()
    assert RunSettings(**json.loads(watched.model_dump_json())).train.track == ("wandb",)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"track": ["comet"]}, "comet"),
        ({"track": ["wandb", "wandb"]}, "names one twice"),
        ({"track_project": "x"}, "no effect without train.track"),
    ],
)
def test_trackers_that_make_no_sense_are_refused(run_settings: Make, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run_settings(train=given)


def test_what_is_missing_is_told_before_anything_is_written(run_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = run_settings(train={"track": ["mlflow"]})
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI"):
        train(settings)
    monkeypatch.setitem(base.PACKAGES, "wandb", "a_package_that_is_not_there")
    with pytest.raises(MissingExtraError, match=r"luthier\[track-wandb\]"):
        check_trackers(["wandb"])
    assert not Path(settings.out).exists()


def test_settings_are_flattened() -> None:
    nested = {"model": "m", "lora": {"r": 3, "target_modules": ["q", "k"], "x": None}, "train": {"betas": (0.9, 0.99)}}
    expected = {"model": "m", "lora.r": 3, "lora.target_modules": '["q", "k"]', "train.betas": "[0.9, 0.99]"}
    assert flattened(nested) == expected
