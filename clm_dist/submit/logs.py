"""The logs of a submission's hosts as one: the driver's and those of the nodes, the host in front of every line."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clm_dist.errors import SubmitError
from clm_dist.submit.spec import Submission

TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_POLL_S = 1.0
_ASK_INTERVAL_S = 5.0


@dataclass
class LogFile:
    """A log, read as it grows."""

    path: Path
    position: int = 0
    when: str = ""
    """Of the last line that had a time; lines without one belong to it."""

    def new_lines(self) -> Iterator[tuple[str, str]]:
        """The lines that are new and whole, each with its time."""
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


@dataclass
class Logs:
    """The logs of a submission."""

    submission: Submission
    _files: dict[Path, tuple[str, LogFile]] = field(default_factory=dict)
    """Each with what stands before its lines."""

    def new_lines(self) -> list[str]:
        """What came since the last call, in the order of its times."""
        for task, name in enumerate(self.submission.run_names):
            files = self.submission.files(task)
            prefix = f"{name} " if self.submission.sweep else ""
            self._add(f"{prefix}driver", files.log)
            for path in sorted(files.nodes.glob("*.log")):
                self._add(prefix + path.stem, path)
        if self.submission.sweep:
            self._add("prepare", self.submission.root / "log")
        logs = self._files.values()
        lines = [(when, f"[{label}] {line}") for label, log in logs for when, line in log.new_lines()]
        return [line for _, line in sorted(lines, key=lambda line: line[0])]

    def follow(self, active: Callable[[], bool]) -> Iterator[str]:
        """The lines that come while the job is active."""
        return follow(self.new_lines, active)

    def _add(self, label: str, path: Path) -> None:
        self._files.setdefault(path, (label, LogFile(path)))


def follow(new_lines: Callable[[], list[str]], active: Callable[[], bool]) -> Iterator[str]:
    """The lines that come while a job is active."""
    goes_on, asked = True, -float("inf")
    while goes_on:
        if time.monotonic() - asked >= _ASK_INTERVAL_S:
            with contextlib.suppress(SubmitError):  # the cluster may be away for a moment
                goes_on = active()
            asked = time.monotonic()
        with contextlib.suppress(SubmitError):
            yield from new_lines()
        time.sleep(_POLL_S if goes_on else 0)
