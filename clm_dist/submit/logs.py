"""Log files and merged logs, read while they grow."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clm_dist.errors import SubmitError

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_POLL_S = 1.0
_ASK_INTERVAL_S = 5.0


@dataclass
class LogFile:
    """A log file, read while it grows."""

    path: Path
    position: int = 0
    when: str = ""
    """Time of the last line that had one; a line without a time belongs to that line."""

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """The complete lines since the last call, each with its time."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self.position)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self.position += len(raw)
                line = raw.decode(errors="replace").rstrip("\r\n")
                if found := TIME.match(line):
                    self.when = found[0]
                yield self.when, line


def follow(new_lines: Callable[[], list[str]], active: Callable[[], bool]) -> Iterator[str]:
    """New lines, until the job is no longer active."""
    goes_on, asked = True, -float("inf")
    while goes_on:
        if time.monotonic() - asked >= _ASK_INTERVAL_S:
            with contextlib.suppress(SubmitError):  # the cluster may be away for a moment
                goes_on = active()
            asked = time.monotonic()
        with contextlib.suppress(SubmitError):
            yield from new_lines()
        time.sleep(_POLL_S if goes_on else 0)
