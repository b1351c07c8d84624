"""`clm-dist status` of runs that were not submitted."""

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clm_dist.files.atomic import write_json
from clm_dist.files.lease import Lease
from clm_dist.files.run_dir import RunDir
from tests.support.command import Said, cells, clm_dist
from tests.support.histories import write_history
from tests.support.leases import leased_elsewhere
from tests.support.plans import plan_run

Status = Callable[..., Said]


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: RunDir) -> Status:
    return lambda *arguments: clm_dist(capsys, monkeypatch, "status", *arguments, "--runs", run.root.parent)


def test_a_run_of_this_machine_is_shown_by_its_name_or_its_path(status: Status, run: RunDir, tmp_path: Path) -> None:
    for which in ("tiny", run.root):
        said = status(which)
        assert (said.code, cells(said.out, "tiny")[:3]) == (0, ["tiny", "done", "24/24"])
    assert "planned" not in said.out
    other = RunDir(tmp_path / "runs" / "it's [bold]")
    other.root.mkdir()
    other.job.write_bytes(run.job.read_bytes())
    assert cells(status(other.root.name).out, "it's [bold]") == ["it's [bold]", "stopped", "", "", ""]


def test_a_run_that_is_trained_says_by_whom_and_what_is_left(status: Status, run: RunDir) -> None:
    run.result.unlink()
    write_history(run.metrics, 200, events=False)
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:120]))
    plan_run(run, device="h200", sizes=[_size(4)])
    assert cells(status("tiny").out, "tiny")[1] == "stopped"
    with Lease(run.root).hold(timeout_s=0):
        said = status("tiny")
    row = cells(said.out, "tiny")
    assert row[1].startswith(f"running (process {os.getpid()} on ")
    assert row[2].endswith("/200")
    assert row[4].startswith("0:")
    assert "\ntiny: planned 1 min 40 s (1 min 30 s to 2 min); at this speed " in said.out
    assert ", done in " in said.out


def test_a_run_of_another_host_may_have_ended(status: Status, run: RunDir) -> None:
    """Its lease says when it was touched last, and nobody promises an end."""
    run.result.unlink()
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:-12]))
    plan_run(run)
    with leased_elsewhere(run.root):
        said = status("tiny")
    since, touched = (time.strftime("%H:%M:%S", time.localtime(1_600_000_000 + later)) for later in (0, 60))
    shown = " ".join(said.out.split())
    assert "perhaps running (process 12 on deadnode, since " in said.out
    assert (since in shown, f"{touched})" in shown) == (True, True)
    assert ("; at this speed " in shown, "of which " in shown, "done in" in shown) == (True, True, False)


def _size(workers: int) -> dict[str, object]:
    seconds = {"value": 100.0, "low": 90.0, "high": 120.0}
    return {"workers": workers, "seconds": seconds, "tokens_per_s": None, "memory_bytes": None}


def test_without_a_name_it_is_the_run_that_has_trained_last(status: Status, run: RunDir) -> None:
    for name, when in (("newer", 2e9), ("older", 1e9)):
        one = RunDir(run.root.parent / name)
        one.root.mkdir()
        one.job.write_bytes(run.job.read_bytes())
        one.metrics.write_bytes(run.metrics.read_bytes())
        write_json(one.result, {"status": "failed"})
        os.utime(one.metrics, (when, when))
    assert cells(status().out, "newer")[:3] == ["newer", "failed", "24/24"]


@pytest.mark.parametrize("which", ["nothing", "x" * 5000, "a\0b"])
def test_a_name_of_nothing_is_refused(status: Status, which: str, run: RunDir) -> None:
    said = status(which)
    assert (said.code, said.err.startswith("error: no run and no submission ")) == (2, True)
    assert said.err.endswith(
        f" in {run.root.parent} (there: tiny); --runs names another directory, `clm-dist run JOB` starts a run, and "
        "`clm-dist submit slurm|k8s JOB` submits\n"
    )
    shutil.rmtree(run.root)
    assert status().err.startswith(f"error: there is no run in {run.root.parent}, and nothing was submitted from it; ")


@pytest.fixture
def private(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of another user, whose directory this one may not look into, also where the tests are root's."""
    other = RunDir(run.root.parent / "private")
    shutil.copytree(run.root, other.root)
    stat = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if path.parent == other.root:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    return other


def test_a_run_that_cannot_be_read_hides_no_other_and_is_named(status: Status, run: RunDir, private: RunDir) -> None:
    assert cells(status().out, "tiny")[1] == "done"
    said = status("private")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: the run {private.root} cannot be read: Permission denied; `ls -ld ")


@pytest.mark.parametrize("which", [".", "..", "link"])
def test_a_run_has_its_name_and_its_lease_however_it_is_named(
    which: str, status: Status, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run.result.unlink()
    plan_run(run)
    links = run.root.parent.with_name("links")
    links.mkdir()
    (links / "link").symlink_to(run.root)
    monkeypatch.chdir({".": run.root, "..": run.final, "link": links}[which])
    with Lease(run.root).hold(timeout_s=0):
        said = status(which)
        assert cells(said.out, "link" if which == "link" else "tiny")[1].startswith("running (")
        said = clm_dist(capsys, monkeypatch, "report", which)
    assert said.code == 0, said.err
    assert "cannot be compared" not in said.out
    assert "which ends it about" in " ".join(said.out.split())


def test_a_status_is_shown_as_it_is_written(status: Status, run: RunDir) -> None:
    write_json(run.result, {"status": "[/red]"})
    assert cells(status("tiny").out, "tiny")[1] == "[/red]"
