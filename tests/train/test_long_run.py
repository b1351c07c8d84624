"""What a run of many steps holds in memory of its records: nothing that grows with the steps."""

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.progress import Silent
from clm_dist.report.page import write_page
from clm_dist.train.ray import driver
from clm_dist.train.ray.failures import WorkersFailedError
from tests.conftest import MakeJob
from tests.train.test_record import sent

_STEPS = 100_000
_MOST_BYTES = 3 * 2**20
"""A tuple a step would be 12 MiB, its record 50."""


@pytest.fixture
def train(
    run: RunDir, make_job: MakeJob, prepared: Callable[[JobConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """The driver on a run of many steps, with workers that fail once, start again, and train no further."""
    job = make_job("train.max_steps=24", "model.config.n_positions=128")
    lines = run.metrics.read_bytes().splitlines(keepends=True)
    step = json.loads(next(line for line in lines if b'"kind": "step"' in line))
    with run.metrics.open("ab") as file:
        file.writelines(json.dumps(step | {"step": 24 + number}).encode() + b"\n" for number in range(_STEPS))

    def train(ending: Callable[[], dict[str, Any]]) -> Any:
        def build_trainer(*arguments: Any) -> Any:
            tracemalloc.start()
            return arguments[-1][0]._recorder

        def fit(recorder: Any, follower: Any, watch: Any) -> dict[str, Any]:
            recorder.receive_failure(0, "killed")
            follower.look()
            recorder.receive([sent({"kind": "start", "step": 24 + _STEPS, "num_steps": 24 + _STEPS} | _WHERE)])
            follower.look()
            return ending()

        monkeypatch.setattr(driver, "build_trainer", build_trainer)
        monkeypatch.setattr(driver, "fit", fit)
        monkeypatch.setattr(driver, "WorkerWatch", lambda *_: None)
        cluster: Any = SimpleNamespace(num_gpus_per_worker=0)
        try:
            result = driver.train(job, run, Store(prepared(job)), cluster, Silent())
            write_page(run, result)
        finally:
            peak = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else _MOST_BYTES
            tracemalloc.stop()
            assert peak < _MOST_BYTES
        return result

    return train


_WHERE = {"workers": 3, "device": "cpu", "strategy": "ddp"}


def test_a_run_that_is_done_holds_no_steps(run: RunDir, train: Callable[..., Any]) -> None:
    shutil.copytree(run.final, run.root / "final.unverified")
    result = train(lambda: {"status": "done"})
    assert (result["train"]["steps"], result["workers"], result["restarts"]) == (24 + _STEPS - 1, 3, 1)
    assert sum(record["kind"] == "step" for record in read_records(run.metrics)) == 24 + _STEPS


def test_a_run_that_fails_holds_no_steps(train: Callable[..., Any]) -> None:
    def fail() -> dict[str, Any]:
        raise WorkersFailedError("worker 1: gone")

    with pytest.raises(RunError, match="worker 0 after step 100023: killed"):
        train(fail)
