"""A shell as people have it: a user without a name, no home, and a TMPDIR that is too long for Ray's sockets."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm_dist.files.atomic import read_json
from tests.conftest import WriteJob

USER = 54321
# So that the user can read a Python and a package wherever they are.
AS_USER = ("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups")
READING = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory of the user."""
    path = Path(tempfile.mkdtemp())
    os.chown(path, USER, USER)
    yield path
    shutil.rmtree(path)


@pytest.mark.long
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
def test_a_run_is_done(write_job: WriteJob, place: Path, corpus: Path) -> None:
    job = Path(shutil.copy(write_job(), place))
    temporary = place / ("for-temporary-files-" * 5)
    temporary.mkdir()
    os.chown(temporary, USER, USER)
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "PYTHONPATH")}
    environment = kept | {"HOME": "/", "TMPDIR": str(temporary)}
    run = ["run", str(job), "--runs", f"{place}/runs", "--store", f"{place}/stores"]
    command = [*AS_USER, *READING, sys.executable, "-m", "clm_dist", *run]
    ended = subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert read_json(place / "runs" / "tiny" / "result.json")["status"] == "done"
    left = [path for path in Path("/tmp").glob("clm-dist-ray-*") if path.stat().st_uid == USER]
    assert left == []
