"""Workers that are stopped, told to stop or killed, under Ray: what is said and saved, and that no number changes."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.train.heartbeat import read_beats
from clm_dist.train.ray import driver
from clm_dist.train.ray.cluster import Cluster
from tests.conftest import MakeJob
from tests.support.notes import Notes
from tests.support.runs import metrics_of, saved_steps

SETTINGS = (
    "cluster.workers=2",
    "batch.micro_size=4",
    "train.epochs=99",
    "train.max_steps=300",
    "eval.every=100",
    "checkpoint.every=20",
    "model.config.resid_pdrop=0.1",
)
Fit = Callable[..., dict[str, Any]]


@pytest.fixture
def fit(cluster: Cluster, prepared: Callable[[JobConfig], Path]) -> Fit:
    def run(job: JobConfig, run: RunDir, progress: Notes | None = None) -> dict[str, Any]:
        return dict(driver.train(job, run, Store(prepared(job)), cluster, progress or Notes()))

    return run


@pytest.fixture(scope="module")
def untouched() -> dict[str, bytes]:
    """The weights of a run that nobody touched, trained once."""
    return {}


@pytest.fixture
def check(fit: Fit, make_job: MakeJob, untouched: dict[str, bytes], tmp_path: Path) -> Callable[[RunDir], None]:
    """Holds the weights of a finished run against those of one that nobody touched, and its steps against the job's."""

    def check(run: RunDir) -> None:
        if not untouched:
            whole = RunDir(tmp_path / "untouched")
            fit(make_job(*SETTINGS), whole)
            untouched["weights"] = (whole.final / "model.safetensors").read_bytes()
        assert (run.final / "model.safetensors").read_bytes() == untouched["weights"]
        assert [r["step"] for r in metrics_of(run.metrics) if r["kind"] == "step"] == list(range(1, 301))

    return check


def step_of(run: RunDir) -> int:
    return max((r["step"] for r in metrics_of(run.metrics) if r["kind"] == "step"), default=0)


def pid_of(run: RunDir, rank: int) -> int:
    return next(beat.pid for beat in read_beats(run.beats) if beat.rank == rank)


def starts_of(run: RunDir) -> list[int]:
    return [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "start"]


@pytest.fixture
def meanwhile() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Does something in a thread while the test trains; what fails there fails the test."""
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []

    def start(action: Callable[[], None]) -> None:
        def act() -> None:
            try:
                action()
            except BaseException as error:
                errors.append(error)

        threads.append(threading.Thread(target=act, daemon=True))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join(60)
    assert not errors


def wait_until(condition: Callable[[], Any], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


Meanwhile = Callable[[Callable[[], None]], None]


@pytest.mark.long
def test_a_worker_that_stands_still_is_named_and_replaced(
    fit: Fit, check: Callable[[RunDir], None], meanwhile: Meanwhile, make_job: MakeJob, tmp_path: Path
) -> None:
    run, notes = RunDir(tmp_path / "run"), Notes()

    def stop_a_worker() -> None:
        wait_until(lambda: step_of(run) >= 50)
        pid = pid_of(run, 1)
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: any("no progress within" in note for note in notes.notes))

    meanwhile(stop_a_worker)
    result = fit(make_job(*SETTINGS, "train.hang_timeout_s=8"), run, notes)
    assert (result["status"], result["restarts"]) == ("done", 1)
    said = next(record["error"] for record in metrics_of(run.metrics) if record["kind"] == "failure")
    assert "worker 1 gives no sign of life: its process is stopped" in said
    assert "at step " in said
    assert re.search(r"(waiting in|last collective) gloo:\w+ number \d+, in ", said)
    assert "loop.py" in said
    assert starts_of(run)[1] >= 40
    check(run)


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGUSR1, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_a_worker_saves_and_the_same_command_goes_on(
    rank: int,
    number: signal.Signals,
    fit: Fit,
    check: Callable[[RunDir], None],
    meanwhile: Meanwhile,
    make_job: MakeJob,
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path / "run")

    def ask() -> None:
        wait_until(lambda: step_of(run) >= 50)
        os.kill(pid_of(run, rank), number)

    meanwhile(ask)
    job = make_job(*SETTINGS)
    result = fit(job, run)
    assert result["status"] == "preempted"
    # Not a step is lost.
    assert saved_steps(run)[-1] == result["train"]["steps"] == step_of(run) < 300
    assert fit(job, run)["status"] == "done"
    assert starts_of(run) == [0, result["train"]["steps"]]
    check(run)


@pytest.mark.slow
def test_a_worker_that_dies_each_time_ends_the_run_with_the_first_death(
    fit: Fit, meanwhile: Meanwhile, make_job: MakeJob, tmp_path: Path
) -> None:
    run, notes = RunDir(tmp_path / "run"), Notes()

    def kill_twice() -> None:
        for number, rank in enumerate((1, 0)):
            wait_until(lambda: len(starts_of(run)) > number and step_of(run) >= 50)  # noqa: B023  # called at once
            os.kill(pid_of(run, rank), signal.SIGKILL)

    meanwhile(kill_twice)
    with pytest.raises(RunError, match=r"more often than train.max_failures allows. worker 1 after step \d+: its proc"):
        fit(make_job(*SETTINGS, "train.max_failures=1"), run, notes)
    assert "(the first of 2 failures; the others were after step " in read_json(run.result)["error"]
    failed = [record for record in metrics_of(run.metrics) if record["kind"] == "failure"]
    assert [record["worker"] for record in failed] == [1, 0]
    assert saved_steps(run)
    assert any("Worker 1 failed after step" in note for note in notes.notes)
