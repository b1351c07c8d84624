"""`clm-dist cancel`, and what any command says where nothing was submitted."""

import errno
import io
import sys

import pytest

from tests.support.fakes import Commands, FakeSlurm


def test_what_is_cancelled_twice_had_ended(commands: Commands, slurm: FakeSlurm) -> None:
    commands.submit("--prepare-first")
    slurm.job(101, "JobState=RUNNING Reason=None NodeList=n1")
    slurm.job(102, "JobState=PENDING Reason=Dependency")
    said = commands.call("cancel")
    assert said.out == "cancelled job 102; submitting the same job again goes on from its last checkpoint\n"
    assert slurm.calls("scancel") == [["101"], ["102"]]
    said = commands.call("cancel", "tiny")
    assert (said.code, said.out) == (0, "job 102 has ended already; nothing to cancel\n")
    assert len(slurm.calls("scancel")) == 2


@pytest.mark.parametrize("command", ["logs", "cancel"])
def test_where_nothing_was_submitted_each_command_says_how(commands: Commands, command: str) -> None:
    said = commands.call(command)
    assert (said.code, said.out) == (2, "")
    assert said.err == (
        f"error: nothing was submitted from {commands.runs}; --runs names another directory, and "
        "`clm-dist submit slurm|k8s JOB` submits\n"
    )
    assert "no submission x from" in commands.call(command, "x").err


@pytest.mark.parametrize("which", ["tiny-learning_rate-2e-5", "101_1"])
def test_one_run_of_a_sweep_is_cancelled_alone(commands: Commands, slurm: FakeSlurm, which: str) -> None:
    commands.submit("--array", "learning_rate=1e-5,2e-5")
    slurm.job("101_1", "ArrayJobId=101 ArrayTaskId=1 JobState=RUNNING Reason=None NodeList=n1")
    assert commands.call("cancel", which).out.startswith("cancelled job 101_1; ")
    assert slurm.calls("scancel") == [["101_1"]]


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_submitted_or_cancelled_is_so_though_nobody_reads_it(commands: Commands, slurm: FakeSlurm) -> None:
    with commands.monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert commands.submit().code == 0
        slurm.job(101, "JobState=RUNNING Reason=None NodeList=n1")
        assert commands.call("cancel").code == 0
    assert (len(slurm.calls("sbatch")), len(slurm.calls("scancel"))) == (1, 1)
