"""Chooses the backend of a submission."""

from typing import Any

from clm_dist.errors import ConfigError, SubmitError
from clm_dist.submit.backend import Backend
from clm_dist.submit.k8s.backend import K8sBackend
from clm_dist.submit.slurm.backend import SlurmBackend
from clm_dist.submit.submission import Submission, submissions


def backend_of(submission: Submission) -> Backend[Any]:
    """The backend that a submission was given to."""
    return SlurmBackend() if submission.backend == "slurm" else K8sBackend()


def check_name(submission: Submission) -> None:
    """Raise ConfigError if a run of this name waits or runs already. Knows only what was submitted from here."""
    for earlier in submissions(submission.runs):
        names = set(earlier.run_names) & set(submission.run_names)
        # The files of a running job lie in a directory of the submission's name.
        if (names or earlier.name == submission.name) and _is_still_active(earlier, submission):
            raise ConfigError(
                f"{min(names, default=earlier.name)} is queued or running already, as "
                f"{backend_of(earlier).describe(earlier)}; see it with `clm-dist status {earlier.name}`, end it with "
                f"`clm-dist cancel {earlier.name}`, or make another run with --set name=...",
                field="name",
            )


def _is_still_active(earlier: Submission, submission: Submission) -> bool:
    try:
        return backend_of(earlier).is_active(earlier)
    except SubmitError:
        if (earlier.backend, earlier.k8s) == (submission.backend, submission.k8s):
            raise
        return False  # another cluster, which may not exist any more
