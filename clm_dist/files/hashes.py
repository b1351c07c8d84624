"""Hashes of files, and a memory of them, so that a file whose size and time are as they were is not read again."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

from clm_dist.errors import ClmDistError
from clm_dist.files.atomic import read_json, write_json


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class HashMemory:
    """Hashes of files by path, size and time of change, in one JSON file.

    Only a memory: where its file is missing or damaged, or cannot be written, files are read again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, str] = dict(read_json(path))
        except (ClmDistError, OSError, ValueError, TypeError):
            self._known = {}

    def get(self, file: Path) -> str | None:
        """The hash of a file that is as it was. Raises OSError where it cannot be looked at."""
        return self._known.get(_state_of(file))

    def remember(self, hashes: Mapping[Path, str]) -> None:
        """Keep the hashes of files as they are now."""
        new = {_state_of(file): value for file, value in hashes.items()}
        if not self._known.keys() >= new.keys():
            self._known |= new
            with contextlib.suppress(ClmDistError):
                write_json(self._path, self._known)


def _state_of(file: Path) -> str:
    stat = file.stat()
    return f"{file}:{stat.st_size}:{stat.st_mtime_ns}"


def changed_files(directory: Path, hashes: Mapping[str, str], known: HashMemory | None = None) -> dict[str, str]:
    """The problem of each file that is not as it was written, by its name in the directory.

    Args:
        hashes: the sha256 that each file must have, by its name in the directory.
        known: files that are as it remembers them are not read, and those that are right are remembered.
    """
    found, right = {}, {}
    for name, sha256 in hashes.items():
        file = directory / name
        try:
            if not file.is_file():
                found[name] = "is missing"
            elif (known and known.get(file)) == sha256 or file_sha256(file) == sha256:
                right[file] = sha256
            else:
                found[name] = "is not as it was written"
        except OSError as error:
            found[name] = f"cannot be read ({error.strerror})"
    if known and not found:
        known.remember(right)
    return found
