"""The logs of a submission's pods as one, with the pod before every line, and without the lines for programs."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from clm_dist.submit.k8s import states
from clm_dist.submit.k8s.kubectl import Kubectl
from clm_dist.submit.k8s.request import selector
from clm_dist.submit.logs import TIME
from clm_dist.submit.submission import Submission
from clm_dist.submit.training import MARK

# A line has no time if it is the server's own, about a log that it cannot read.
_LINE = re.compile(r"\[pod/([^\]]+)\] (?:(\d{4}-\d\d-\d\dT\S+)(?: |$))?(.*)")
_MARGIN = timedelta(seconds=60)
"""Lines may arrive this much later than others of the same time, because clocks differ."""


@dataclass
class ContainerLog:
    """How far a container's log was read."""

    label: str
    when: str = ""
    """Time of the last line that had one; a line without a time belongs to that line."""
    last: tuple[str, int] = ("", 0)
    """The server's time of the last line, and the line's place among those of that time."""


@dataclass
class PodLogs:
    """The logs of a submission."""

    submission: Submission
    _containers: dict[str, ContainerLog] = field(default_factory=dict)
    _since: str | None = None

    def new_lines(self) -> list[str]:
        """The lines since the last call, in the order of their times. Raises SubmitError if the cluster is away."""
        kubectl, labels = Kubectl.of(self.submission), selector(self.submission.name)
        said = kubectl.logs(labels, self._since).split("\n")
        parts = [match.groups(default="") for line in said if (match := _LINE.fullmatch(line))]
        names = {container for container, *_ in parts}
        if names - self._containers.keys():
            pods = kubectl.find("pods", labels)
            drivers = {pod["metadata"]["name"] for pod in pods if states.is_driver(pod)}
            for container in names - self._containers.keys():
                pod = container.partition("/")[0]
                self._containers[container] = ContainerLog("driver" if pod in drivers else pod)
        lines: list[tuple[str, str]] = []
        places: dict[str, tuple[str, int]] = {}
        for container, time, text in parts:
            log = self._containers[container]
            before, count = places.get(container, ("", 0))
            places[container] = here = (time, count + 1 if time == before else 1)
            if here > log.last:
                if found := TIME.match(text):
                    log.when = found[0]
                if MARK not in text:
                    lines.append((log.when, f"[{log.label}] {text}"))
        for container, here in places.items():
            self._containers[container].last = max(here, self._containers[container].last)
        if not any(line.startswith("error:") and "waiting to start" not in line for line in said):
            self._since = self._newest() or self._since  # only if no log was unreadable, so no line is skipped
        return [line for _, line in sorted(lines, key=lambda line: line[0])]

    def _newest(self) -> str | None:
        """The time up to which all logs were read."""
        times = [datetime.fromisoformat(log.last[0]) for log in self._containers.values() if log.last[0]]
        return (max(times) - _MARGIN).isoformat(timespec="seconds") if times else None
