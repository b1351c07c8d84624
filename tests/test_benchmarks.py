"""Benchmarks that measure our own code run, with little to measure."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_rays_workers_and_torchruns_are_measured() -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "workers.py"),
        "--workers",
        "2",
        "--rounds",
        "1",
        "--steps",
        "4",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    row = ended.stdout.splitlines()[-1].strip("| ").split(" | ")
    assert row[0] == "2"
    assert all(float(figure.replace(",", "")) > 0 for figure in row[1:])


@pytest.mark.slow
def test_what_many_workers_ask_for_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "scale_sim.py"), "--workers", "8", "--tokens", "5e7"]
    ended = subprocess.run([*command, "--directory", str(tmp_path)], capture_output=True, text=True, check=True)
    rows = ended.stdout.splitlines()
    assert len(rows) == 18
    assert "| mappings of a worker (counted) | 3 of 3 shards; the system allows " in rows[2]
