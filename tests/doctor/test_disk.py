"""Space and speed of the directories that a run writes to."""

import errno
import os
from pathlib import Path

import pytest

from clm_dist.doctor.disk import Disk, judge_disk, judge_write, measure_write, read_disk
from clm_dist.doctor.finding import Finding
from clm_dist.doctor.need import Place
from tests.support.disks import mounted

GIB = 2**30
RUNS = Place("runs", "/shared/runs", "--runs", is_shared=True)
WIDE = Disk("/shared/runs", "nfs4", 100 * GIB, 10**6)


def judged(found: Disk, needed: int | None = None) -> list[Finding]:
    return list(judge_disk(RUNS, found, needed))


def test_a_directory_that_is_not_there_yet_is_that_above_it(tmp_path: Path) -> None:
    found = read_disk(str(tmp_path / "runs" / "deep"))
    assert (found.existing, found.problem) == (str(tmp_path), None)
    assert found.free > 0
    assert not list(tmp_path.iterdir())


def test_a_small_disk_is_read_and_a_full_one_is_an_error(tmp_path: Path) -> None:
    with mounted(tmp_path / "a disk", "size=2m,nr_inodes=50") as disk:
        found = read_disk(str(disk))
        assert (found.kind, found.existing) == ("tmpfs", str(disk))
        assert 0 < found.free <= 2 * 2**20
        assert found.free_inodes is not None
        assert found.free_inodes < 50
        assert [one.severity for one in judged(found)] == ["warning", "warning", "note"]
        (disk / "filling").write_bytes(bytes(found.free - 4096))
        full = judged(read_disk(str(disk)))
        assert (full[0].severity, "KiB free (tmpfs)" in full[0].what) == ("error", True)


def test_a_disk_that_may_not_be_written_is_an_error(tmp_path: Path) -> None:
    with mounted(tmp_path / "a disk", "size=1m,ro") as disk:
        (finding,) = judged(read_disk(str(disk / "runs")))
        assert finding.severity == "error"
        assert os.strerror(30) in finding.what


def test_a_file_in_place_of_a_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    (finding,) = judged(read_disk(str(tmp_path / "runs")))
    assert (finding.severity, "runs is not a directory" in finding.what) == ("error", True)


def test_a_directory_of_another_user_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may look everywhere, so the system's answer is made up."""
    closed, stat = tmp_path / "closed", Path.stat

    def answer(path: Path, **options: bool) -> os.stat_result:
        if closed in path.parents:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, **options)

    closed.mkdir()
    monkeypatch.setattr(Path, "stat", answer)
    found = read_disk(str(closed / "runs"))
    assert found.existing == str(closed)
    assert found.problem == os.strerror(errno.EACCES)


def test_storage_whose_server_has_lost_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: Path, **options: bool) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def status(path: Path) -> os.statvfs_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "stat", answer)
    monkeypatch.setattr(os, "statvfs", status)
    (finding,) = judged(read_disk("/shared/runs"))
    assert (finding.severity, os.strerror(errno.ESTALE) in finding.what) == ("error", True)


def test_a_wide_disk_is_ok() -> None:
    (finding,) = judged(WIDE, 5 * GIB)
    assert finding.severity == "ok"
    assert "the run takes about 5.0 GiB" in finding.what


def test_less_space_than_the_run_takes_is_an_error_that_may_pass() -> None:
    (finding,) = judged(WIDE, 101 * GIB)
    assert (finding.severity, finding.passes) == ("error", True)
    assert "100.0 GiB free (nfs4), and the run takes about 101.0 GiB" in finding.what


def test_few_inodes_are_told() -> None:
    (finding,) = judged(Disk("/shared/runs", "nfs4", 100 * GIB, 12))
    assert "12 more files" in finding.what
    # Of file systems that count none.
    assert judged(Disk("/shared/runs", "btrfs", 100 * GIB, None))[0].severity == "ok"


def test_writing_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    assert measure_write(str(tmp_path)) > 0
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_takes_longer_than_there_is_to_save_is_told() -> None:
    speeds = [100 * 2**20] * 2
    (slow,) = judge_write(RUNS, speeds, 40 * GIB, signal_s=120)
    assert slow.severity == "warning"
    assert "200.0 MiB/s are written by 2 nodes at once; a checkpoint of about 40.0 GiB takes 204.8 s" in slow.what
    assert "cluster.slurm.signal_s to 409" in slow.mend
    (quick,) = judge_write(RUNS, speeds, 20 * GIB, signal_s=120)
    assert quick.severity == "ok"


@pytest.mark.parametrize("needed", [None, 0])
def test_what_is_not_known_is_not_said(needed: int | None) -> None:
    assert "the run takes" not in judged(WIDE, needed)[0].what
