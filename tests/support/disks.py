"""Small disks of their own, which a test fills or makes read-only; permissions of files."""

import contextlib
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(disk: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; skips where that takes rights that the tests do not have."""
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that are not here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def mode(path: Path) -> int:
    """The permissions of a file or a directory."""
    return stat.S_IMODE(path.stat().st_mode)
