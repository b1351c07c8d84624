"""Nobody reads what a command says: its work goes on, and its exit code is that of the work."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clm_dist.cli.streams import unfailing
from tests.conftest import WriteJob
from tests.support.command import clm_dist

COMMAND = (sys.executable, "-m", "clm_dist")


def close(*numbers: int) -> Callable[[], None]:
    def closed() -> None:
        for number in numbers:
            os.close(number)

    return closed


@pytest.mark.parametrize(
    "how", ["closed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("full", "nobody reads"))]
)
def test_a_preparation_goes_on(how: str, write_job: WriteJob, tmp_path: Path) -> None:
    options: dict[str, Any]
    if how == "full":
        full = Path("/dev/full").open("w")  # noqa: SIM115
        options = {"stdout": full, "stderr": full}
    elif how == "closed":
        options = {"preexec_fn": close(0, 1, 2)}
    else:
        read, write = os.pipe()
        os.close(read)
        options = {"stdout": write, "stderr": write}
    ended = subprocess.run([*COMMAND, "prepare", write_job(), "--store", tmp_path / "stores"], **options)
    assert ended.returncode == 0
    (manifest,) = (tmp_path / "stores").glob("*/manifest.json")
    # What the command opens is not taken for a standard stream, into which libraries write.
    assert b"Preparing" not in manifest.read_bytes()
    assert subprocess.run([*COMMAND, "prepare", "--verify", manifest.parent], capture_output=True).returncode == 0


def test_an_error_keeps_its_exit_code(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([*COMMAND, "run", tmp_path / "none.yaml"], stdout=full, stderr=full).returncode == 2
    assert subprocess.run([*COMMAND, "run", tmp_path / "none.yaml"], preexec_fn=close(0, 1, 2)).returncode == 2


def test_what_a_command_starts_has_streams_too() -> None:
    code = (
        "import subprocess, sys; from clm_dist.cli.streams import open_missing; open_missing(); "
        "sys.exit(subprocess.run(['sh', '-c', '[ -e /proc/self/fd/0 ] && echo a && echo b >&2']).returncode)"
    )
    assert subprocess.run([sys.executable, "-c", code], preexec_fn=close(0, 1, 2)).returncode == 0


def test_what_only_shows_ends_with_its_reader() -> None:
    read, write = os.pipe()
    os.close(read)
    assert subprocess.run([*COMMAND, "schema"], stdout=write, stderr=subprocess.PIPE).returncode != 0


def test_an_error_that_ends_the_process_is_told_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, write_job: WriteJob, tmp_path: Path
) -> None:
    from clm_dist.train.ray.own import RayEndedError

    def fail(*_: object, **__: object) -> None:
        raise RayEndedError.because("a test")

    ended: list[int] = []
    monkeypatch.setattr("clm_dist.run.run_job", fail)
    monkeypatch.setattr(os, "_exit", ended.append)
    said = clm_dist(capsys, monkeypatch, "run", write_job(), "--runs", tmp_path)
    assert ended == [75]
    assert "error: Ray, or a part of it, has ended before the run (a test)" in said.err


def test_a_stream_is_as_it_was_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    with unfailing("stdout"):
        assert sys.stdout is not before
        assert sys.stdout.encoding == before.encoding
        print("one")
    assert sys.stdout is before
    assert capsys.readouterr().out == "one\n"
