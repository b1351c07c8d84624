"""The progress of a submission's runs, in the same terms for every kind of cluster."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clm_dist.submit.training import Training

_ENDED = {
    # of Slurm
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
    # of Kubernetes, in addition to FAILED
    *("DONE", "DELETED"),
}


@dataclass(frozen=True)
class JobState:
    """The state of a job in its cluster."""

    state: str
    """PENDING, RUNNING, COMPLETED, ..., as Slurm writes it; for Kubernetes a similar word."""
    reason: str = ""
    """Why it waits or ended, in words."""
    nodes: str = ""
    restarts: int | None = None
    """None if the cluster does not say."""
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
    """None if Slurm does not know the job any more."""
    training: Training | None = None
    """None if no worker has begun."""
    result: dict[str, Any] | None = None
    """Its result.json, if it has ended; on Kubernetes only the `status`, because the claim is not mounted here."""
    planned: str | None = None
    """The time that was planned beside the one that it takes, in words; None if it has no plan."""

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
    """The state of a run, in a word or two."""
    if run.job is not None and run.job.active:
        return run.job.state.lower()
    if run.result is not None:
        return str(run.result["status"])
    return run.job.state.lower() if run.job else "ended, and Slurm has forgotten how"
