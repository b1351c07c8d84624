"""The errors of the package, by who must act. The exit code follows from the class, and a scheduler from the exit code.

    ClmDistError              1   base of all; not raised itself
    ├── RunError              1   the run failed, and the same command would fail again
    ├── MendFirstError        2   a person must mend something before the same command is run again
    │   ├── ConfigError           the job file or the call
    │   │   └── DataError         the data that the job names
    │   ├── CheckpointError       a checkpoint that the run cannot go on from
    │   └── SubmitError           a cluster refuses a job
    │       └── ClusterAwayError      exit code 75: the cluster does not answer
    └── TryAgainError        75   nothing in the job is wrong: the same command may work later
        ├── StorageError          a disk is full, a storage or a server is away
        ├── HubError              the Hub does not answer
        └── NotReadyError         nodes that the run needs are not there yet

Each boundary to a library has one translator: `files.atomic.writing` for local disks, `files.storage.reaching` for
what fsspec reaches, `files.hub_errors` for the clients of the Hub, `prepare.data_file.reading` for the formats of
data files, `train.ray.failures` for Ray.
"""

import errno
import re
import shutil
from pathlib import Path
from typing import Self


class ClmDistError(Exception):
    """An error that a person understands: the message says cause, fix and, where there is one, the command.

    Args:
        field: dotted name of the job's field at fault, if one is.
    """

    exit_code = 1
    ends_process = False
    """Whether the process can no longer end as others do: a library would end it in its own way."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders; the default would lose the keyword.
        return (_rebuild, (type(self), str(self), self.field))

    def at(self, place: str) -> Self:
        """The same error, beginning with the place that it was found at."""
        return type(self)(f"{place}: {self}", field=self.field)


def _rebuild(kind: type[ClmDistError], message: str, field: str | None) -> ClmDistError:
    return kind(message, field=field)


class RunError(ClmDistError):
    """The run failed: a non-finite loss, ranks that disagree, workers that keep dying.

    In a worker this is raised on every rank in the same step, never on one alone.
    """


class MendFirstError(ClmDistError):
    """A person must mend something before the same command is run again."""

    exit_code = 2


class ConfigError(MendFirstError):
    """The job file or the call is wrong."""


class DataError(ConfigError):
    """The data that the job names is wrong: a broken file, a missing field, too little text."""


class CheckpointError(MendFirstError):
    """The run cannot go on from a checkpoint: it is damaged, or of another job."""


class SubmitError(MendFirstError):
    """The cluster refused a job, or could not be asked."""


class ClusterAwayError(SubmitError):
    """The cluster does not answer; the same command may work later. Callers handle it as any other SubmitError."""

    exit_code = 75


class TryAgainError(ClmDistError):
    """The same command may work later, with the same job; what was done until then is kept."""

    exit_code = 75


class StorageError(TryAgainError):
    """A disk is full, or a disk, a storage or a server does not answer."""


class HubError(TryAgainError):
    """The Hub does not answer, or not as it should."""


class NotReadyError(TryAgainError):
    """Nodes that the run needs are not there yet."""


FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_AWAY = {errno.EIO, errno.ESTALE}
"""A disk does not answer. Other numbers that an absent server causes may come from a network connection."""


def describe_os_error(error: BaseException, path: Path) -> ClmDistError | None:
    """The error that a person understands where a file cannot be written; None for anything else.

    Returns:
        StorageError for a disk that is full or does not answer, ConfigError for one that may not be written.
    """
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL:
        existing = next(p for p in (path, *path.parents) if p.exists())
        free_mib = shutil.disk_usage(existing).free / 2**20
        return StorageError(
            f"no space left while writing {path} ({free_mib:.0f} MiB free there); free some space, or name another "
            "disk with --runs or --store (TMPDIR for what is on its way there, HF_HOME for what comes from the Hub), "
            "and run the same command again"
        )
    if error.errno in REFUSED:
        return ConfigError(
            f"cannot write {path}: {error.strerror}; name a directory that you may write to with --runs or --store "
            "(or CLM_DIST_RUNS, CLM_DIST_STORE)"
        )
    if error.errno in _AWAY:
        return StorageError(f"cannot write {path}: {error.strerror}; run the same command again when its disk answers")
    return None


_COLOURS = re.compile(r"\x1b\[[\d;]*m")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop and colours; its class where there is none."""
    text = _COLOURS.sub("", str(error)).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
