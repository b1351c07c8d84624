"""The rendered script, run by bash with programs in place of Slurm and Python: when it requeues, and when it does not."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.submit.slurm import Request, render_run
from clm_dist.submit.spec import Submission
from tests.conftest import MakeJob

# Ray's nodes end as the real ones do: when the attempt is over.
SRUN = """\
trap 'exit 143' TERM
while [ "$(cat "$STATE/attempt")" = "12.$SLURM_RESTART_COUNT" ]; do
    [ ! -e "$STATE/ray-dies" ] || exit 1
    sleep 0.1
done
"""
# The driver: `python -m clm_dist run`. The first call only imports clm_dist.
PYTHON = """\
[ "$1" != -c ] || exit 0
trap 'echo USR1 >>"$STATE/signals"; exit 75' USR1
trap 'echo TERM >>"$STATE/signals"; exit 75' TERM
env >"$STATE/environment"
echo "$*" >"$STATE/driver"
while [ ! -e "$STATE/exit" ]; do sleep 0.1; done
exit "$(cat "$STATE/exit")"
"""
PROGRAMS = {
    "srun": SRUN,
    "python": PYTHON,
    # Slurm ends what it requeues.
    "scontrol": 'case $1 in requeue) touch "$STATE/requeued"; kill -KILL $PPID ;; *) echo node1; echo node2 ;; esac',
    "getent": "echo 127.0.1.1 node2; echo 10.1.2.4 node2",
    "ip": '[ "$4" = 10.1.2.4 ] && echo "10.1.2.4 dev eth0 src 10.1.2.3 uid 0"',
}


class Script:
    """A script that runs."""

    def __init__(self, state: Path, script: Path, attempt: int) -> None:
        self.state = state
        environment = {**os.environ, "STATE": str(state), "SLURM_RESTART_COUNT": str(attempt), "SLURM_JOB_ID": "12"}
        environment |= {
            "PATH": "/usr/bin:/bin",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }
        with (state / "log").open("wb") as log:
            self.process = subprocess.Popen(["bash", str(script)], stdout=log, stderr=log, env=environment)

    def begin(self) -> "Script":
        self._until(lambda: (self.state / "driver").exists())
        return self

    def finish(self) -> int:
        return self.process.wait(30)

    def end_driver(self, code: int) -> None:
        (self.state / "exit").write_text(str(code))

    @property
    def requeued(self) -> bool:
        return (self.state / "requeued").exists()

    def said(self) -> str:
        return (self.state / "log").read_text()

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)


Start = Callable[..., Script]


@pytest.fixture
def start(tmp_path: Path, make_job: MakeJob) -> Start:
    """Starts the script of the tiny job on two nodes, as one of its attempts."""

    def begin(attempt: int = 0, *settings: str) -> Script:
        programs = tmp_path / "venv with ' quote" / "bin"
        programs.mkdir(parents=True)
        for name, body in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        job = make_job("cluster.slurm.nodes=2", "cluster.slurm.max_requeues=3", *settings)
        submission = Submission("tiny", "slurm", tmp_path / "my $(runs)", ("tiny",))
        submission.root.mkdir(parents=True)
        submission.script.write_text(render_run(job, Request(submission, "s3://a/b", programs.parent)))
        return Script(submission.root, submission.script, attempt)

    return begin


def test_what_is_done_is_not_requeued_and_leaves_neither_token_nor_temporary_files(start: Start) -> None:
    script = start().begin()
    token = script.state / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text()) == 64
    environment = dict(
        line.split("=", 1) for line in (script.state / "environment").read_text().splitlines() if "=" in line
    )
    # The address that the route to another host has, and not the one that the host's name stands for.
    assert environment["RAY_ADDRESS"] == "10.1.2.3:20012"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert environment["CLM_DIST_NODES"] == "2"
    assert environment["CLM_DIST_RUNS"] == str(script.state.parent.parent)
    temporary = Path(environment["TMPDIR"])
    assert temporary.stat().st_mode & 0o777 == 0o700
    assert (script.state / "driver").read_text() == f"-m clm_dist run {script.state}/job.yaml\n"
    script.end_driver(0)
    assert script.finish() == 0
    assert not script.requeued
    assert not token.exists()
    assert not temporary.exists()


@pytest.mark.parametrize("code", [1, 2])
def test_what_fails_by_its_own_fault_is_not_requeued(start: Start, code: int) -> None:
    script = start().begin()
    script.end_driver(code)
    assert script.finish() == code
    assert not script.requeued


def test_usr1_reaches_the_driver_and_requeues(start: Start) -> None:
    script = start().begin()
    script.process.send_signal(signal.SIGUSR1)
    assert script.finish() == -signal.SIGKILL
    assert (script.state / "signals").read_text() == "USR1\n"
    assert script.requeued
    assert "signal USR1" in script.said()


def test_term_reaches_the_driver_and_leaves_the_requeue_to_slurm(start: Start) -> None:
    script = start().begin()
    script.process.send_signal(signal.SIGTERM)
    assert script.finish() == 128 + signal.SIGTERM
    assert (script.state / "signals").read_text() == "TERM\n"
    assert not script.requeued


def test_a_failed_ray_ends_the_driver_and_requeues(start: Start) -> None:
    script = start().begin()
    (script.state / "ray-dies").touch()
    assert script.finish() == -signal.SIGKILL
    assert script.requeued
    assert "Ray has ended" in script.said()


def test_a_driver_that_fails_because_ray_did_is_requeued(start: Start) -> None:
    script = start().begin()
    script.end_driver(1)
    (script.state / "ray-dies").touch()
    assert script.finish() == -signal.SIGKILL
    assert script.requeued


def test_the_last_requeue_is_the_last(start: Start) -> None:
    script = start(3).begin()
    script.end_driver(75)
    assert script.finish() == 75
    assert not script.requeued
    assert "not requeued: cluster.slurm.max_requeues" in script.said()


def test_an_attempt_that_slurm_requeued_too_often_does_not_begin(start: Start) -> None:
    script = start(4)
    assert script.finish() == 1
    assert not (script.state / "driver").exists()
    assert "cluster.slurm.max_requeues is 3" in script.said()


def test_an_attempt_that_a_later_one_has_followed_does_not_requeue(start: Start) -> None:
    script = start().begin()
    (script.state / "attempt").write_text("12.1\n")
    assert script.finish() == 1
    assert not script.requeued
    assert "a later attempt has begun" in script.said()
    # The later one's.
    assert (script.state / "attempt").read_text() == "12.1\n"


def test_without_clm_dist_in_the_environment_nothing_begins(start: Start, tmp_path: Path) -> None:
    script = start(0, f"cluster.slurm.venv={tmp_path}/none")
    assert script.finish() == 2
    assert not (script.state / "driver").exists()


def test_another_attempt_takes_another_port(start: Start) -> None:
    script = start(2).begin()
    assert "RAY_ADDRESS=10.1.2.3:22030\n" in (script.state / "environment").read_text()
    script.end_driver(0)
    assert script.finish() == 0
