"""How far a submission's runs are: what every kind of cluster tells of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ENDED = {
    # Slurm's
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
    # Kubernetes', besides FAILED
    *("DONE", "DELETED"),
}


@dataclass(frozen=True)
class JobState:
    """What the cluster knows of a job."""

    state: str
    """As Slurm writes it: PENDING, RUNNING, COMPLETED, ...; of Kubernetes a word like those."""
    reason: str = ""
    """Why it waits or ended, in words."""
    nodes: str = ""
    restarts: int | None = None
    """None where the cluster did not say."""
    seconds_left: float | None = None
    """Until its time limit."""

    @property
    def active(self) -> bool:
        return self.state not in _ENDED


@dataclass(frozen=True)
class RunState:
    """How far a run of a submission is."""

    name: str
    job_id: str
    job: JobState | None
    """None where Slurm has forgotten the job."""
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None
    seconds_left: float | None = None
    """Reckoned from its last steps, without evaluations."""
    result: dict[str, Any] | None = None
    """Its result.json, if it has ended; from a claim that is not seen here, no more than its `status`."""

    @property
    def is_training(self) -> bool:
        return self.job is not None and self.job.state == "RUNNING" and self.result is None


@dataclass(frozen=True)
class Status:
    """How far a submission is."""

    runs: Sequence[RunState]
    note: str = ""
    """A line about the whole, for example about a job that prepares first."""


def describe(run: RunState) -> str:
    """Where a run is, in a word or two."""
    if run.job is not None and run.job.active:
        return run.job.state.lower()
    if run.result is not None:
        return str(run.result["status"])
    return run.job.state.lower() if run.job else "ended, and Slurm has forgotten how"
