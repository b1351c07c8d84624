"""Storage whose locks are refused, not there, or granted to everybody: one process at a time writes all the same."""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.drills.test_prepare_kills import NUM_PARTITIONS, Preparation, partitions_in, records
from tests.support.runs import metrics_of

__all__ = ["records"]
pytestmark = pytest.mark.slow
LOCKS = {"refused": errno.ENOLCK, "missing": errno.ENOSYS, "for everybody": 0}
WORST = "for everybody"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("library") / "bad_locks.so"
    source = Path(__file__).parent / "bad_locks.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source), "-ldl"], check=True)
    return path


@pytest.fixture(params=[pytest.param(name, marks=() if name == WORST else pytest.mark.long) for name in LOCKS])
def storage(request: pytest.FixtureRequest, library: Path, tmp_path: Path) -> dict[str, str]:
    """Environment in which files below tmp_path have such locks."""
    return {
        "LD_PRELOAD": str(library),
        "BAD_LOCKS": str(LOCKS[request.param]),
        "BAD_LOCKS_UNDER": str(tmp_path),
    }


def test_the_locks_are_bad(storage: dict[str, str], tmp_path: Path) -> None:
    number = int(storage["BAD_LOCKS"])
    with (tmp_path / "held").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for call in ("flock", "lockf"):
            lock = f"import fcntl; fcntl.{call}(open({held.name!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
            environment = os.environ | storage
            ended = subprocess.run([sys.executable, "-c", lock], capture_output=True, text=True, env=environment)
            assert (os.strerror(number) in ended.stderr) if number else (ended.returncode == 0), ended.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, records: Path) -> dict[str, bytes]:
    """The files of a store that one process made."""
    alone = Preparation(tmp_path_factory.mktemp("alone"), records)
    alone.finish()
    return alone.files()


def test_three_that_prepare_the_same_store_make_it_once(
    storage: dict[str, str], tmp_path: Path, records: Path, whole: dict[str, bytes]
) -> None:
    preparation = Preparation(tmp_path, records, environment=storage)
    processes = [preparation.start() for _ in range(3)]
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sorted(len(partitions_in(err)) for _, err in said) == [0, 0, NUM_PARTITIONS]
    made_by = [process.pid for process, (_, err) in zip(processes, said, strict=True) if partitions_in(err)]
    others = [err for _, err in said if not partitions_in(err)]
    waiting = rf"Waiting for another process that prepares the same blocks: process {made_by[0]} on \S+, since 20"
    assert all(re.search(waiting, " ".join(err.split())) for err in others), said
    assert preparation.files() == whole


def test_a_run_has_one_driver(storage: dict[str, str], tmp_path: Path, write_job: WriteJob) -> None:
    job = write_job("train.max_steps=100000", "train.epochs=100000", "checkpoint.every=100")
    command = [sys.executable, "-m", "clm_dist", "run", str(job), "--runs", str(tmp_path / "runs")]
    command += ["--store", str(tmp_path / "store")]
    environment = os.environ | storage
    pipe = subprocess.PIPE
    first = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        run = RunDir(tmp_path / "runs" / "tiny")
        while first.poll() is None and not (run.metrics.exists() and len(metrics_of(run.metrics)) > 3):
            time.sleep(0.2)
        second = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert second.returncode == 2, second.stderr
        said = " ".join(second.stderr.split())
        assert re.search(
            rf"is being trained by another process \(process {first.pid} on \S+, since [^)]+\); wait", said
        )
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=120) == 75
    finally:
        first.kill()
        first.communicate()
    assert not list((tmp_path / "runs").glob(".*"))
