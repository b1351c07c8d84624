"""A disk that is full when a command writes: exit code 75, what to free, and what was there stays."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.support.command import Said, clm_dist
from tests.support.disks import mounted

Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    return lambda *arguments: clm_dist(capsys, monkeypatch, *arguments)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "size=4m") as disk:
        yield disk


def fill(disk: Path, *, but: int = 0) -> Path:
    """Take all space of a disk but some bytes."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(disk).free - but))
    return ballast


def assert_told(said: Said, disk: Path) -> None:
    assert (said.code, "Traceback" in said.err) == (75, False), said.err
    assert f"no space left while writing {disk}" in said.err
    assert "free some space" in said.err


def test_a_preparation_goes_on_where_the_disk_was_full(
    command: Command, disk: Path, write_job: WriteJob, tmp_path: Path
) -> None:
    job = write_job()
    needed = 0
    # Wherever it is full: in the directory, the encoded partitions, the shards, the tokenizer, the manifest.
    for needed in range(0, 2**18, 2**12):
        ballast = fill(disk, but=needed)
        said = command("prepare", job, "--store", disk / "stores")
        ballast.unlink()
        if said.code == 0:
            break
        assert_told(said, disk)
    assert said.code == 0
    assert needed >= 2**14
    whole = tmp_path / "whole"
    command("prepare", job, "--store", whole)
    (store,) = (path for path in whole.iterdir() if path.is_dir() and len(path.name) == 16)
    for file in store.rglob("*"):
        if file.is_file():
            assert (disk / "stores" / file.relative_to(whole)).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["run", "report", "push"])
def test_a_run_that_is_done_stays_so(
    command: Command, disk: Path, finished_run: RunDir, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, disk / "runs" / "tiny")))
    (run.root / "report.html").unlink(missing_ok=True)
    before = {file: file.read_bytes() for file in run.root.rglob("*") if file.is_file()}
    ballast = fill(disk)
    options = ["run", run.job, "--runs", run.root.parent] if name == "run" else [name, run.root]
    assert_told(command(*options), disk)
    ballast.unlink()
    assert {file: file.read_bytes() for file in run.root.rglob("*") if file.is_file()} == before
