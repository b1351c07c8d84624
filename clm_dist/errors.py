"""What can go wrong, by whose fault it is; the exit code follows from the class."""

import errno
import shutil
from pathlib import Path


class ClmDistError(Exception):
    """Something a person can act on: the message says cause, fix and, where there is one, the command."""

    exit_code = 1


class ConfigError(ClmDistError):
    """The job file or the call is wrong. `field` is the dotted name of the job's field at fault."""

    exit_code = 2

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders; the default would lose the keyword.
        return (_rebuild_config_error, (type(self), str(self), self.field))


def _rebuild_config_error(kind: type[ConfigError], message: str, field: str | None) -> ConfigError:
    return kind(message, field=field)


class DataError(ConfigError):
    """The data that the job names is wrong: a broken file, a missing field, too little text."""


class ReadError(ConfigError):
    """The data cannot be read, by a fault of the disk, the network or a server, or because a file is cut short.

    Unlike a DataError it may be gone the next time, so what is done so far is kept.
    """


class CheckpointError(ClmDistError):
    """A checkpoint cannot be written, or cannot be resumed from."""


class RunError(ClmDistError):
    """The run failed: a non-finite loss, ranks that disagree, workers that keep dying.

    In a worker this is raised on every rank in the same step, never on one alone.
    """


class SubmitError(ClmDistError):
    """The cluster refused a job, or could not be asked."""


class NotReadyError(ClmDistError):
    """What the run needs is not there yet; the same command may find it later."""

    exit_code = 75


class HubError(ClmDistError):
    """The Hub refused or could not be reached."""


def describe_os_error(error: Exception, path: Path) -> ConfigError | None:
    """The error that a person understands for a full or unwritable disk; None for anything else."""
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (path, *path.parents) if p.exists())
        free_mib = shutil.disk_usage(existing).free / 2**20
        return ConfigError(
            f"no space left while writing {path} ({free_mib:.0f} MiB free there); free some space, or name another "
            "disk with --runs or --store (TMPDIR for what is on its way there), and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return ConfigError(
            f"cannot write {path}: {error.strerror}; name a directory that you may write to with --runs or --store "
            "(or CLM_DIST_RUNS, CLM_DIST_STORE)"
        )
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its class where there is none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
