"""MLflow: a run of the store that MLFLOW_TRACKING_URI names, or of mlflow.db where none does."""

from __future__ import annotations

import logging
import os
import time
from typing import Any
from urllib.parse import urlsplit, urlunsplit

# MLflow reports its use to its makers and tries a server for minutes, unless the user says else.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from rolora.errors import BadInput
from rolora.run.trackers import PROJECT, About

if "MLFLOW_LOGGING_LEVEL" not in os.environ:
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # not how it makes its tables

_STATUS = {"finished": "FINISHED", "killed": "KILLED", "failed": "FAILED"}
_BATCH = 100  # parameters that MLflow takes at once
_EVERY_ROUND = "bytes/total"


class MLflow:
    def __init__(self, about: About):
        uri = _uri(about)
        self._client = MlflowClient(tracking_uri=uri)
        if about.identity is None:
            self._run = self._new(about)
            self.last = -1
        else:
            self._run = str(about.identity["run_id"])
            self.last = self._found(uri)
        self.identity: dict[str, Any] = {"run_id": self._run, "uri": _bare(uri)}
        self.where = f"run {self._run} in {_bare(uri)}"

    def _new(self, about: About) -> str:
        named = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if about.project is not None or named is None:
            name = about.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self._client.get_experiment_by_name(name)
            named = self._client.create_experiment(name) if known is None else known.experiment_id
        run = self._client.create_run(named, run_name=about.name).info.run_id
        params = [Param(name, str(value)) for name, value in about.options.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run, params=params[start : start + _BATCH])
        return str(run)

    def _found(self, uri: str) -> int:
        """The last round that the run holds, which is running again."""
        try:
            self._client.update_run(self._run, status="RUNNING")
            held = self._client.get_metric_history(self._run, _EVERY_ROUND)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise BadInput(
                f"--track mlflow: run {self._run}, in which this run is tracked, is not in "
                f"{_bare(uri)}: set MLFLOW_TRACKING_URI to where it is, or leave mlflow out of "
                "--track"
            ) from None
        return max((metric.step for metric in held), default=-1)

    def send(self, round: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, round) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, status: str) -> None:
        self._client.set_terminated(self._run, _STATUS[status])


def _uri(about: About) -> str:
    """The store: what the environment names, else the one that the run began in."""
    begun = None if about.identity is None else str(about.identity["uri"])
    if begun is not None and not os.environ.get("MLFLOW_TRACKING_URI"):
        return begun
    return str(mlflow.get_tracking_uri())


def _bare(uri: str) -> str:
    """Without a user's name and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def begin(about: About) -> MLflow:
    return MLflow(about)
