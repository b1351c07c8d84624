"""A memory of what files held, so that one whose size and time are as they were is not read again."""

from collections.abc import Mapping
from pathlib import Path

from clm_dist.errors import ClmDistError
from clm_dist.files.atomic import read_json, write_json


class HashMemory:
    """Hashes of files by path, size and time of change, in one JSON file.

    Only a memory: where the file is missing or damaged, files are read again.
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
            write_json(self._path, self._known)


def _state_of(file: Path) -> str:
    stat = file.stat()
    return f"{file}:{stat.st_size}:{stat.st_mtime_ns}"
