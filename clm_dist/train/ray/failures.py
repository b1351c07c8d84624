"""Why a run failed: the cause that a person can act on, in what Ray Train raises."""

from pathlib import Path

import ray

from clm_dist.errors import ClmDistError, RunError, describe_os_error, first_line
from clm_dist.files.record_types import FailureRecord
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray import private
from clm_dist.train.ray.own import RayEndedError, log_dir


class WorkersFailedError(RunError):
    """Workers failed more often than they may; why they did the last time."""


def cause_of(error: Exception) -> BaseException:
    """The error in one of Ray Train that a person can act on: the worker's own, if it is one of ours."""
    failures = dict(getattr(error, "worker_failures", {}))
    if controller_failure := getattr(error, "controller_failure", None):
        failures[-1] = controller_failure
    own = private.own_error(error)
    for cause in (*causes_of(failures).values(), own):
        if isinstance(cause, ClmDistError):
            return cause
        if isinstance(cause, OSError) and (described := describe_os_error(cause, Path(str(cause.filename or "/")))):
            return described
    if isinstance(own, ray.exceptions.RayError):
        return RayEndedError.because(first_line(own))
    if not failures:
        return error
    rank, reason = reason_of(failures)
    if rank == -1:
        return RunError(
            f"the run's controller failed, which is not tried again: {reason}. The committed checkpoints are whole; "
            f"the same command goes on from the last. Ray's logs lie in {log_dir()}"
        )
    return WorkersFailedError(f"worker {rank}: {reason}")


def failures_of(run: RunDir) -> list[FailureRecord]:
    """The records of workers' deaths."""
    return [record for record in read_records(run.metrics, last_steps=0) if record["kind"] == "failure"]


def with_first_death(failed: WorkersFailedError, failures: list[FailureRecord]) -> RunError:
    """The error that a person reads: what came first is the reason, what came last may be its consequence."""
    reason, times = str(failed), ""
    if failures:
        first = failures[0]
        reason = f"worker {first['worker']} after step {first['step']}: {first['error']}"
        if len(failures) > 1:
            steps = ", ".join(str(failure["step"]) for failure in failures[1:])
            times = f" (the first of {len(failures)} failures; the others were after step {steps})"
    return RunError(
        f"workers failed more often than train.max_failures allows. {reason}{times}. The committed checkpoints are "
        f"whole; the same command goes on from the last. The workers' logs lie in {log_dir()}"
    )


def causes_of(failures: dict[int, Exception]) -> dict[int, Exception]:
    """The error that each rank raised itself, in the order of the ranks; Ray Train wraps it."""
    return {rank: private.own_error(failure) for rank, failure in sorted(failures.items())}


def reason_of(failures: dict[int, Exception]) -> tuple[int, str]:
    """The rank whose failure is the cause of the others', and what happened to it.

    When a process ends, those that wait for it fail in their collectives; a worker whose error is one of ours knows
    best.
    """
    causes = causes_of(failures)

    def is_consequence(cause: Exception) -> int:
        if isinstance(cause, ClmDistError):
            return 0
        if hasattr(cause, "health_check_failure"):
            return 1
        lost = type(cause).__name__ in ("RuntimeError", "DistBackendError", "DistNetworkError")
        return 3 if lost and "onnection" in str(cause) else 2

    rank = min(causes, key=lambda rank: (is_consequence(causes[rank]), rank))
    cause = causes[rank]
    if hasattr(cause, "health_check_failure"):
        return rank, "its process ended (killed, out of memory, or its node is gone)"
    return rank, f"{type(cause).__name__}: {first_line(cause)}"
