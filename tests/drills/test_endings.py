"""What ends under a run: its terminal, or the Ray that it started. It saves what it can, and says 75."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.support.processes import descendants, running
from tests.support.runs import saved_steps

TIMEOUT_S = 300


@pytest.fixture
def command(write_job: WriteJob, tmp_path: Path) -> list[str]:
    job = write_job("train.max_steps=4000", "train.epochs=9999", "checkpoint.every=20", "eval.every=1000")
    return [sys.executable, "-m", "clm_dist", "run", str(job), "--runs", str(tmp_path), "--store", f"{tmp_path}/stores"]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test, which are killed at its end with all that they started."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for pid in running([process.pid, *descendants(process.pid)]):
            os.kill(pid, signal.SIGKILL)
        process.wait()


def wait_for_commit(process: subprocess.Popen[str], run: RunDir) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not saved_steps(run):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while running(pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.long
def test_a_terminal_that_closes(command: list[str], started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    ours, its = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, text=True, preexec_fn=take_terminal)
    started.append(process)
    os.close(its)
    run = RunDir(tmp_path / "tiny")
    wait_for_commit(process, run)
    of_ray = descendants(process.pid)
    os.close(ours)
    assert process.wait(TIMEOUT_S) == 75
    result = read_json(run.result)
    assert (result["status"], result["train"]["steps"]) == ("preempted", saved_steps(run)[-1])
    assert_gone(of_ray)


@pytest.mark.long
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_ray_that_ends(name: str, command: list[str], started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started.append(process)
    run = RunDir(tmp_path / "tiny")
    wait_for_commit(process, run)
    of_ray = descendants(process.pid)
    (pid,) = (p for p in of_ray if Path(f"/proc/{p}/comm").read_text().strip() == name)
    os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75, err
    assert (
        f"error: Ray, or a part of it, has ended before the run (its process {name} is gone). The committed checkpoints"
        in err
    )
    assert f"Ray's logs lie in {run.ray_logs}" in err
    assert (run.ray_logs / "raylet.out").is_file()
    assert read_json(run.result)["status"] == "failed"
    assert_gone(of_ray)
