"""One class for each tracker, all with the same calls; those of other packages have them too.

They call the libraries themselves. The classes of `accelerate.tracking` (1.15) load torch, refuse to work without a
`PartialState`, and make a request to MLflow for each step and a call to Comet for each number.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clm_dist.extensions import load_extension
from clm_dist.files.record_types import Record
from clm_dist.train.tensorboard import numbers_of
from clm_dist.train.trackers.prometheus import Prometheus

_PROJECT = "clm-dist"
"""Where the environment names no project."""
_TAG = "clm-dist"
_UNSENT = {"step/blocks"}
"""A checksum is no figure."""


class Row(NamedTuple):
    """The numbers of a step or an evaluation."""

    kind: str
    """`step` or `eval`."""
    step: int
    values: dict[str, float]
    """By names as `step/loss` and `eval/perplexity`."""


def rows_of(records: Iterable[Record]) -> list[Row]:
    """The figures of the steps and evaluations among records."""
    return [
        Row(record["kind"], record["step"], {name: value for name, value in values.items() if name not in _UNSENT})
        for record in records
        if (values := numbers_of(record))
    ]


class Tracker(Protocol):
    """A run at a tracker. Whatever it raises ends its own process alone.

    One with an attribute `live` that is true shows the run as it is, and keeps nothing: each start of its process gets
    all records, and steps that are trained again come again.
    """

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        """Begin a run of this name, or go on with the one of `run_id`. Return its id.

        Args:
            fields: of the job, by their dotted names.
            directory: for what the tracker writes.
        """

    @property
    def url(self) -> str | None:
        """Address of the run, where it has one."""

    def add(self, records: Sequence[Record]) -> None:
        """Take the next records of the run, see `unsent.Queue`; an evaluation may come after later steps."""

    def finish(self, status: str) -> None:
        """Send what is left.

        Args:
            status: of the run: done, preempted, or failed.
        """


class Wandb:
    """Weights & Biases."""

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=name,
            id=run_id or uuid.uuid4().hex,
            resume="allow",
            config=dict(fields),
            allow_val_change=True,
            tags=[_TAG],
            dir=str(directory),
            # Streams, program and repository of this process are nothing of the run.
            settings=wandb.Settings(console="off", disable_code=True, disable_git=True),
        )
        # wandb drops what comes for an earlier step of its own count.
        self._run.define_metric("*", step_metric="global_step")
        return str(self._run.id)

    @property
    def url(self) -> str | None:
        return self._run.url or None

    def add(self, records: Sequence[Record]) -> None:
        for row in rows_of(records):
            self._run.log({"global_step": row.step, **row.values})

    def finish(self, status: str) -> None:
        if status == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if status == "done" else 1)


_MLFLOW_STATUS = {"done": "FINISHED", "preempted": "KILLED", "failed": "FAILED"}


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    _BATCH = 1000
    """Metrics that a request may have, see "Log Batch" of MLflow's REST API; it may have 100 parameters."""
    _PARAM_CHARACTERS = 6000

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if run_id:
            # Its parameters cannot be changed.
            self._client.update_run(run_id, status="RUNNING")
            self._id = run_id
            return run_id
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        self._id = str(self._client.create_run(experiment, run_name=name, tags={_TAG: "true"}).info.run_id)
        params = [Param(field, str(value)[: self._PARAM_CHARACTERS]) for field, value in fields.items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    @property
    def url(self) -> str | None:
        return None

    def add(self, records: Sequence[Record]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, row.step) for row in rows_of(records) for key, value in row.values.items()]
        for first in range(0, len(metrics), self._BATCH):
            self._client.log_batch(self._id, metrics=metrics[first : first + self._BATCH])

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, _MLFLOW_STATUS[status])


class Trackio:
    """Trackio: on this machine, or in the Space or at the server that its environment variables name."""

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        import trackio

        # It finds a run again by its name alone.
        unique = run_id or f"{name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(project=_PROJECT, name=unique, config=dict(fields), resume="allow", embed=False)
        return unique

    @property
    def url(self) -> str | None:
        return None

    def add(self, records: Sequence[Record]) -> None:
        for row in rows_of(records):
            self._run.log(row.values, step=row.step)

    def finish(self, status: str) -> None:
        self._run.finish()


class Comet:
    """Comet."""

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        import comet_ml

        run_id = run_id or uuid.uuid4().hex
        self._experiment = comet_ml.start(
            project_name=os.environ.get("COMET_PROJECT_NAME", _PROJECT),
            experiment_key=run_id,
            mode="get_or_create",
            experiment_config=comet_ml.ExperimentConfig(
                name=name,
                tags=[_TAG],
                offline_directory=str(directory),
                log_code=False,
                log_git_metadata=False,
                log_git_patch=False,
            ),
        )
        self._experiment.log_parameters(dict(fields))
        return run_id

    @property
    def url(self) -> str | None:
        return self._experiment.url or None

    def add(self, records: Sequence[Record]) -> None:
        for row in rows_of(records):
            self._experiment.log_metrics(row.values, step=row.step)

    def finish(self, status: str) -> None:
        self._experiment.log_other("status", status)
        self._experiment.end()


TRACKERS: Mapping[str, Callable[[], Tracker]] = {
    "wandb": Wandb,
    "mlflow": Mlflow,
    "trackio": Trackio,
    "comet": Comet,
    "prometheus": Prometheus,
}
"""By their names in the job file; TensorBoard's files are written by the recorder."""
GROUP = "clm_dist.trackers"


def load_tracker(name: str) -> Callable[[], Tracker]:
    """The class of a tracker, built in or of an installed package. Raises ConfigError where it cannot be loaded."""
    return TRACKERS.get(name) or load_extension(GROUP, name, field="tracking")
