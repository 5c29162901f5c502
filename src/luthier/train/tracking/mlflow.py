"""A run in MLflow, on the server that MLFLOW_TRACKING_URI names. Needs the client only (mlflow-skinny)."""

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.train.tracking.base import PROJECT, Record, RunFacts, Status

STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
# The server takes so many at once: https://mlflow.org/docs/latest/rest-api.html#log-batch
METRICS_AT_ONCE, PARAMETERS_AT_ONCE = 1000, 100
LONGEST_VALUE = 6000
# Their own patience is ten minutes for one request. What fails here is sent again with the next lines.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class Mlflow:
    """Metrics as float64 with the step and the time they were made; a status; files as artefacts."""

    def __init__(self) -> None:
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
        self.run_id = ""

    def begin(self, facts: RunFacts, run_id: str | None) -> str:
        """Open a run in the experiment of the settings, MLFLOW_EXPERIMENT_NAME or "luthier"."""
        from mlflow.entities import Param, RunTag

        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
            self.run_id = run_id
            return run_id
        if not self.run_id:  # else it was opened, and its parameters did not get through
            experiment = self._experiment(facts.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
            started = time.time_ns() // 1_000_000
            self.run_id = self.client.create_run(experiment, start_time=started, run_name=facts.name).info.run_id
        # A pattern of ranks is a key of its own, and MLflow's names have fewer letters than regular expressions.
        named = {re.sub(r"[^\w.\-/ ]", "_", key): value for key, value in facts.parameters.items()}
        parameters = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in named.items()]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self.client.log_batch(self.run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in facts.facts.items()])
        return self.run_id

    def log(self, records: Sequence[Record]) -> None:
        """Send metrics; the same ones twice are kept once."""
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, round(1000 * record.time), record.step)
            for record in records
            for key, value in record.figures.items()
        ]
        for start in range(0, len(metrics), METRICS_AT_ONCE):
            self.client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_AT_ONCE])

    def artifact(self, path: Path) -> None:
        """Upload a file, or a folder under its own name."""
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), path.name)
        else:
            self.client.log_artifact(self.run_id, str(path))

    def finish(self, status: Status) -> None:
        """Set the status: FINISHED, KILLED where it was interrupted, FAILED."""
        self.client.set_terminated(self.run_id, STATUS[status])

    def _experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self.client.create_experiment(name))
