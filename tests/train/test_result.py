"""The content of result.json."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.files.blocks import Manifest
from clm_dist.files.result import build_result
from clm_dist.files.run_dir import RunDir
from tests.conftest import MakeJob
from tests.support.runs import metrics_of


def test_elastic_workers_are_as_many_as_started_last(
    run: RunDir, make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    job = make_job("cluster.workers=[1,2]")
    manifest = Manifest.read(prepared(job) / "manifest.json")
    start = next(record for record in metrics_of(run.metrics) if record["kind"] == "start")
    for workers in (2, 1):
        with run.metrics.open("a") as file:
            file.write(json.dumps(start | {"workers": workers}) + "\n")
        assert build_result(job, run, manifest, "done")["workers"] == workers
    run.metrics.unlink()
    assert build_result(job, run, manifest, "failed", "no Ray")["workers"] == 2


def test_the_commit_of_code_that_went_before_the_installed_is_recorded(
    run: RunDir, make_job: MakeJob, prepared: Callable[[JobConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    manifest = Manifest.read(prepared(job) / "manifest.json")
    assert "commit" not in build_result(job, run, manifest, "done")["versions"]
    monkeypatch.setenv("CLM_DIST_COMMIT", "1a2b-changed")
    assert build_result(job, run, manifest, "done")["versions"]["commit"] == "1a2b-changed"
