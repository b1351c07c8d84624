"""The exit code of each kind of error, and of each fault that a command may meet."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import (
    CheckpointError,
    ClmDistError,
    ClusterAwayError,
    ConfigError,
    DataError,
    HubError,
    MendFirstError,
    NotReadyError,
    RunError,
    StorageError,
    SubmitError,
    TryAgainError,
    describe_os_error,
)
from tests.conftest import WriteJob
from tests.support.command import clm_dist

CLASSES: dict[type[ClmDistError], int] = {
    ClmDistError: 1,
    RunError: 1,
    MendFirstError: 2,
    CheckpointError: 2,
    ConfigError: 2,
    DataError: 2,
    SubmitError: 2,
    ClusterAwayError: 75,
    TryAgainError: 75,
    HubError: 75,
    NotReadyError: 75,
    StorageError: 75,
}
OS_ERRORS = {
    errno.ENOSPC: 75,
    errno.EDQUOT: 75,
    errno.EACCES: 2,
    errno.EPERM: 2,
    errno.EROFS: 2,
    errno.ENOTDIR: 2,
    errno.EEXIST: 2,
    errno.EIO: 75,
    errno.ESTALE: 75,
    # Not ours to explain: raised as it is.
    errno.EINVAL: None,
}
ENDS: dict[str, tuple[Any, int]] = {
    "done": ({"status": "done", "train": {"steps": 1}}, 0),
    "preempted": ({"status": "preempted", "train": {"steps": 1}}, 75),
    "Ctrl-C": (KeyboardInterrupt(), 130),
    "an error of ours": (RunError("the loss is nan"), 1),
    "a wrong job file": (ConfigError("wrong", field="train.epochs"), 2),
    "not ready": (NotReadyError("no nodes yet"), 75),
    "a full disk": (StorageError("no space left"), 75),
    "a Hub that is away": (HubError("the Hub is not reachable"), 75),
    "a checkpoint of another job": (CheckpointError("saved with another seed"), 2),
}
"""What the run returns or raises, and how `clm-dist run` ends."""


def kinds(kind: type[ClmDistError] = ClmDistError) -> Iterator[type[ClmDistError]]:
    """An error class and those below it in the same module."""
    yield kind
    for inner in kind.__subclasses__():
        if inner.__module__ == kind.__module__:
            yield from kinds(inner)


def test_every_class_of_errors_has_its_exit_code() -> None:
    assert {kind: kind.exit_code for kind in kinds()} == CLASSES


@pytest.mark.parametrize("number", OS_ERRORS, ids=lambda number: errno.errorcode[number])
def test_a_fault_of_the_disk_has_its_exit_code(number: int, tmp_path: Path) -> None:
    error = describe_os_error(OSError(number, "as the system says"), tmp_path / "file")
    assert (error.exit_code if error else None) == OS_ERRORS[number]


@pytest.mark.parametrize("end", ENDS)
def test_a_command_ends_with_the_exit_code_of_what_happened(
    end: str, write_job: WriteJob, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    result, code = ENDS[end]

    def run_job(*_: Any, **__: Any) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr("clm_dist.run.run_job", run_job)
    job = write_job()
    said = clm_dist(capsys, monkeypatch, "run", job, "--runs", tmp_path / "runs", "--store", tmp_path / "store")
    assert said.code == code


def test_an_option_that_does_not_exist_is_a_fault_of_the_call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert clm_dist(capsys, monkeypatch, "run", "--no-such-option").code == 2
