"""MLflow: a server, or a database in the run folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from shodh_moe.trackers.facts import commit_of, settings_of, start_files
from shodh_moe.trackers.state import load_state
from shodh_moe.trackers.tracker import Point, TrackedRun

MOST_METRICS, MOST_PARAMS, LONGEST = 1000, 100, 500  # what a request may hold, and a parameter's characters
# Seconds and further tries of a request; the library's own would wait for minutes.
REQUEST = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class MLflow:
    """A run of an MLflow experiment: settings are its parameters, numbers its metrics, files its artifacts.

    Without ``telemetry.mlflow_uri`` and MLFLOW_TRACKING_URI it is kept in ``trackers/mlflow/`` of the run folder.
    """

    def __init__(self, run: TrackedRun):
        for name, value in REQUEST.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        folder = (run.own_folder / "mlflow").resolve()
        uri = run.telemetry.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        artifacts = None
        if not uri:
            folder.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        self._client, self._folder = MlflowClient(tracking_uri=uri), run.folder
        state = load_state(run, "mlflow")
        if state.where == uri and state.id:
            self._id = state.id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(run, artifacts)
            state.begin(uri, self._id)
        for path in start_files(run.folder):
            self._client.log_artifact(self._id, str(path))

    def _create(self, run: TrackedRun, artifacts: str | None) -> str:
        name = run.telemetry.mlflow_experiment
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name, artifacts)
        tags = {"mlflow.source.git.commit": commit} if (commit := commit_of(run.folder)) else {}
        created: str = self._client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        from mlflow.entities import Param

        params = [Param(key, str(value)[:LONGEST]) for key, value in settings_of(run.folder).items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(created, params=params[first : first + MOST_PARAMS])
        return created

    def add(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, scalars in points for name, value in scalars.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + MOST_METRICS])

    def add_images(self, images: Mapping[str, np.ndarray], step: int) -> None:
        """Add pictures as artifacts; each replaces the one before it of the same name."""
        for name, image in images.items():
            self._client.log_image(self._id, image, artifact_file=f"{name}.png")

    def add_report(self, results: Point, files: list[Path]) -> None:
        self.add([results])
        for path in files:
            below = path.relative_to(self._folder).parent.as_posix()
            self._client.log_artifact(self._id, str(path), None if below == "." else below)

    def close(self, finished: bool = True) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
