"""What the commands need of a cluster. `slurm` and `k8s` each have a class that provides it; `launch` chooses one."""

from collections.abc import Iterator
from typing import Protocol, TypeVar

from clm_dist.submit.states import Status
from clm_dist.submit.submission import Submission


class Launch(Protocol):
    """A job that is to be submitted, with its options; each backend has its own."""

    @property
    def submission(self) -> Submission:
        """What is remembered of it."""


class Logs(Protocol):
    """The logs of a submission, all hosts merged."""

    def new_lines(self) -> list[str]:
        """The lines since the last call, in the order of their times. Raises SubmitError if the cluster is away."""


LaunchT = TypeVar("LaunchT", bound=Launch)
_LaunchT_contra = TypeVar("_LaunchT_contra", bound=Launch, contravariant=True)


class Backend(Protocol[_LaunchT_contra]):
    """A kind of cluster. Every method but `render` and `describe` may ask the cluster, and raise SubmitError."""

    def render(self, launch: _LaunchT_contra) -> str:
        """The text of what would be submitted. Asks no cluster.

        Raises:
            ConfigError: the job cannot be submitted as it is.
        """

    def check(self, launch: _LaunchT_contra) -> None:
        """Find what is wrong with a launch before anything is created.

        Raises:
            ConfigError: it does not fit the cluster, or something is in its way.
        """

    def warnings(self, launch: _LaunchT_contra) -> Iterator[str]:
        """What the user may not have intended."""

    def submit(self, launch: _LaunchT_contra) -> Submission:
        """Submit a launch, and remember it. Nothing stays in the cluster if it fails."""

    def describe(self, submission: Submission) -> str:
        """The name that the cluster has for a submission."""

    def status(self, submission: Submission) -> Status:
        """The progress of each run of a submission."""

    def is_active(self, submission: Submission) -> bool:
        """Whether one of its jobs waits or runs."""

    def logs(self, submission: Submission) -> Logs:
        """The logs of all hosts of a submission."""

    def cancel(self, submission: Submission, task: int | None = None) -> str:
        """End a submission, or one run of a sweep. What the runs have saved stays.

        Returns:
            what was done, as a sentence for the user.
        """
