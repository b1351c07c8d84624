"""The metrics of a run by Prometheus' names, from the run's records.

Gauges are of the last record, and go back with a run whose workers start again. Counters are totals of the run, also of
what earlier starts of it trained.
"""

import math
from collections.abc import Mapping
from typing import Any

from clm_dist.files.record_types import Record, StartRecord, StepRecord

_STATES = ("running", "done")
_OF_STEP = {
    "loss": ("train_loss", "Mean loss of the last step's predicted tokens, in nats."),
    "lr": ("learning_rate", "Learning rate of the last step."),
    "grad_norm": ("grad_norm", "2-norm of the last step's gradient before clipping; NaN where it is not finite."),
    "epoch": ("epoch", "Passes over the training blocks."),
    "tokens_per_s": ("tokens_per_second", "Tokens per second in the last step."),
    "mfu": (
        "mfu_ratio",
        "Model FLOPs utilization: share of the peak of the GPUs that the last step took.",
    ),
    "memory_bytes": ("memory_bytes", "Memory of rank 0: the peak of a GPU's tensors, else that of the process."),
}
_OF_EVAL = {
    "step": ("eval_step", "Step of the last evaluation."),
    "loss": ("eval_loss", "Mean loss of the eval split's predicted tokens, in nats."),
    "perplexity": ("eval_perplexity", "Perplexity of the eval split."),
    "bits_per_byte": ("eval_bits_per_byte", "Bits per byte of the eval split's text."),
}
_OF_CHECKPOINT = {
    "step": ("checkpoint_step", "Step of the last checkpoint that was committed."),
    "bytes": ("checkpoint_size_bytes", "Bytes of that checkpoint."),
    "seconds": ("checkpoint_duration_seconds", "Seconds from the begin of that save to its last file on the storage."),
    "blocked": ("checkpoint_blocked_seconds", "Seconds of that save in which training waited."),
}
_OF_START = {
    "workers": ("workers", "Workers of the run."),
    "num_steps": ("planned_steps", "Steps of the whole run."),
    "step": ("step", "Steps that are trained."),
}
_COUNTERS = {
    "steps": "Steps that were trained; those that are trained again count once.",
    "tokens": "Tokens of these steps.",
    "step_seconds": "Seconds of these steps.",
    "data_wait_seconds": "Seconds of these steps in which rank 0 waited for blocks.",
    "restarts": "How often workers started again.",
    "worker_failures": "How often workers died.",
    "checkpoints": "Checkpoints that were committed.",
    "checkpoint_failures": "Checkpoints that could not be written.",
    "outliers": "Steps whose loss or gradient was not finite, or whose loss stood out.",
}


class RunMetrics:
    """The figures of a run. Each has the label `run`; one that nothing was said of is not shown."""

    def __init__(self, name: str, registry: Any) -> None:
        from prometheus_client import Counter, Enum, Gauge, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]
        of = {"namespace": "clm_dist", "registry": registry}
        gauges = [*_OF_STEP.values(), *_OF_EVAL.values(), *_OF_CHECKPOINT.values(), *_OF_START.values()]
        self._name = name
        self._gauges = {metric: Gauge(metric, text, ["run"], **of) for metric, text in gauges}
        self._counters = {
            metric: Counter(metric, text, ["run"], **of).labels(name) for metric, text in _COUNTERS.items()
        }
        self._state = Enum("state", "State of the run.", ["run"], states=_STATES, **of).labels(name)
        self._num_starts = 0
        self._counted = 0
        """The last step that was counted."""

    def set_done(self) -> None:
        self._state.state("done")

    def take(self, record: Record) -> None:
        if record["kind"] == "start":
            self._take_start(record)
        elif record["kind"] == "step":
            self._take_step(record)
        elif record["kind"] == "eval":
            self._set(_OF_EVAL, {**record, "perplexity": _or(math.inf, record["perplexity"])})
        elif record["kind"] == "checkpoint" and "error" in record:
            self._counters["checkpoint_failures"].inc()
        elif record["kind"] == "checkpoint":
            self._counters["checkpoints"].inc()
            self._set(_OF_CHECKPOINT, record)
        elif record["kind"] == "failure":
            self._counters["worker_failures"].inc()
        elif record["kind"] in ("nonfinite", "spike"):
            self._counters["outliers"].inc()

    def _take_start(self, start: StartRecord) -> None:
        self._num_starts += 1
        if self._num_starts > 1:
            self._counters["restarts"].inc()
        self._set(_OF_START, start)

    def _take_step(self, step: StepRecord) -> None:
        self._set(_OF_STEP, {**step, "grad_norm": _or(math.nan, step["grad_norm"])})
        self._set({"step": _OF_START["step"]}, step)
        if step["step"] > self._counted:
            self._counted = step["step"]
            self._counters["steps"].inc()
            self._counters["tokens"].inc(step["tokens"])
            self._counters["step_seconds"].inc(step["seconds"])
            self._counters["data_wait_seconds"].inc(step["data_wait"])

    def _set(self, metrics: Mapping[str, tuple[str, str]], record: Mapping[str, Any]) -> None:
        """Show the fields of a record that have a value."""
        for field, (metric, _) in metrics.items():
            if (value := record.get(field)) is not None:
                self._gauges[metric].labels(self._name).set(value)


def _or(value: float, figure: float | None) -> float:
    return value if figure is None else figure
