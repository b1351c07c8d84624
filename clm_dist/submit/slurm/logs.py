"""The logs of a Slurm job's hosts as one: the driver's and those of the nodes, with the host before every line."""

from dataclasses import dataclass, field
from pathlib import Path

from clm_dist.submit.logs import LogFile
from clm_dist.submit.submission import Submission


@dataclass
class HostLogs:
    """The logs of a submission."""

    submission: Submission
    _files: dict[Path, tuple[str, LogFile]] = field(default_factory=dict)
    """Each with the label of its lines."""

    def new_lines(self) -> list[str]:
        """The lines since the last call, in the order of their times."""
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

    def _add(self, label: str, path: Path) -> None:
        self._files.setdefault(path, (label, LogFile(path)))
