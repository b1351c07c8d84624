"""Pointers of Git LFS: what a clone holds in place of a large file until `git lfs pull`."""

from pathlib import Path

_BEGIN = b"version https://git-lfs.github.com/spec/v1"
_MAX_BYTES = 1024


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is a pointer. Raises OSError where it cannot be read."""
    if file.stat().st_size > _MAX_BYTES:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_BEGIN)) == _BEGIN
