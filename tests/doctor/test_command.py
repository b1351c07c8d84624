"""`clm-dist doctor` on this machine, and what `run` says of it before it begins."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clm_dist.doctor.examine import examine
from clm_dist.doctor.quick import examine_quickly
from clm_dist.files.stores import Stores
from tests.conftest import MakeJob, WriteJob
from tests.doctor.test_machine import LARGE
from tests.support.command import clm_dist, modules_of
from tests.support.disks import mounted

# The size of a model takes seconds, and more where other tests run.
PATIENTLY = ("--timeout", "120")


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the shell that the tests run in."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "RAY_", "NCCL", "GLOO")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("CLM_DIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CLM_DIST_STORE", str(tmp_path / "stores"))


def test_a_job_that_would_work_here_is_found_so(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, write_job: WriteJob, tmp_path: Path
) -> None:
    said = clm_dist(capsys, monkeypatch, "doctor", write_job(), "--json", *PATIENTLY)
    found = json.loads(said.out)
    assert said.code == found["exit_code"] == 0
    subjects = {finding["subject"] for finding in found["findings"] if finding["severity"] == "ok"}
    assert {"versions", "disk", "job"} <= subjects
    assert not (tmp_path / "runs").exists()
    (facts,) = found["facts"].values()
    assert facts["versions"]["packages"]["ray"]


def test_the_text_has_no_line_of_more_than_80_columns(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A path may be longer.
    monkeypatch.setenv("CLM_DIST_RUNS", "/tmp/runs")
    monkeypatch.setenv("CLM_DIST_STORE", "/tmp/stores")
    said = clm_dist(capsys, monkeypatch, "doctor")
    assert said.code == 0
    assert max(map(len, said.out.splitlines())) <= 80


def test_workers_that_do_not_fit_here_are_an_error(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, write_job: WriteJob
) -> None:
    monkeypatch.setattr("clm_dist.doctor.examine.find_size", lambda *_: None)
    said = clm_dist(capsys, monkeypatch, "doctor", write_job(), "--set", "cluster.cpus_per_worker=4096")
    assert said.code == 2
    assert "this machine has" in " ".join(said.out.split())


def test_a_full_disk_is_an_error_that_may_pass(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, write_job: WriteJob, tmp_path: Path
) -> None:
    with mounted(tmp_path / "a disk", "size=1m") as disk:
        (disk / "filling").write_bytes(bytes(2**20 - 8192))
        said = clm_dist(capsys, monkeypatch, "doctor", write_job(), "--runs", disk, *PATIENTLY)
    assert said.code == 75, said.out
    assert "the run takes about" in " ".join(said.out.split())


def test_what_another_estimates_of_the_disk_is_taken(make_job: MakeJob, tmp_path: Path) -> None:
    report = examine(
        make_job(),
        tmp_path / "runs",
        Stores(tmp_path / "stores"),
        time_s=120,
        disk_needs=lambda job, num: {"store": 2**60},
    )
    assert [finding.what.split(" (")[0] for finding in report.findings if finding.severity == "error"] == ["store"]


def test_settings_without_a_job_are_refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = clm_dist(capsys, monkeypatch, "doctor", "--set", "train.epochs=1")
    assert (said.code, "--set goes with a job file" in said.err) == (2, True)


def test_a_directory_whose_server_is_away_is_not_checked_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file system that does not answer keeps its reader for ever."""
    monkeypatch.setattr("clm_dist.doctor.probe._DISK_S", 0.1)
    monkeypatch.setattr("clm_dist.doctor.probe.read_disk", lambda path: time.sleep(3600))
    report = examine(None, tmp_path / "runs", Stores(tmp_path / "stores"))
    unchecked = [finding.what for finding in report.findings if finding.severity == "unchecked"]
    assert any("is its server away?" in what for what in unchecked)
    assert report.exit_code == 0


# --- what `run` says


def test_a_run_says_what_disturbs_it_and_goes_on(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, write_job: WriteJob
) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    monkeypatch.setattr("clm_dist.run._resolve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    said = clm_dist(capsys, monkeypatch, "run", write_job())
    assert said.code == 130
    assert "warning: TMPDIR=/nowhere/at/all is not a directory" in said.err


def test_a_machine_that_cannot_be_looked_at_keeps_no_run_from_its_work(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read() -> None:
        raise ValueError("no such line in /proc/meminfo")

    monkeypatch.setattr("clm_dist.doctor.quick.read_machine", read)
    assert examine_quickly(make_job(), tmp_path / "runs", Stores(tmp_path / "stores")) == []
    assert "this machine could not be examined: ValueError: no such line" in caplog.text


def test_a_quiet_machine_is_not_spoken_of(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clm_dist.doctor.quick.read_machine", lambda: LARGE)
    assert examine_quickly(make_job(), tmp_path / "runs", Stores(tmp_path / "stores")) == []


def test_what_workers_elsewhere_have_is_not_judged_by_this_machine(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job("cluster.workers=2", "cluster.cpus_per_worker=64")
    monkeypatch.setattr("clm_dist.doctor.quick.read_machine", lambda: replace(LARGE, usable_cpus=1))
    (finding,) = examine_quickly(job, tmp_path / "runs", Stores(tmp_path / "stores"))
    assert "may use 1 of 16 CPUs" in finding.what
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert examine_quickly(job, tmp_path / "runs", Stores(tmp_path / "stores")) == []


def test_the_quick_checks_load_nothing_heavy() -> None:
    _, modules = modules_of("doctor", "--help")
    assert not {name.partition(".")[0] for name in modules} & {"torch", "ray", "transformers", "huggingface_hub"}
