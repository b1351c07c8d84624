"""The logs of a submission's pods as one, the pod in front of every line."""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from clm_dist.submit.k8s import states
from clm_dist.submit.k8s.kubectl import Kubectl
from clm_dist.submit.k8s.request import selector
from clm_dist.submit.logs import TIME
from clm_dist.submit.submission import Submission

# The server's time is not before what it says itself of a log that it cannot get.
_LINE = re.compile(r"\[pod/([^\]]+)\] (?:(\d{4}-\d\d-\d\dT\S+)(?: |$))?(.*)")
_MARGIN = timedelta(seconds=60)
"""Lines may come so much later than others of their time, and clocks differ."""


@dataclass
class ContainerLog:
    """What was read of a container's log."""

    label: str
    when: str = ""
    """Of the last line that had a time of its own; lines without one belong to it."""
    last: tuple[str, int] = ("", 0)
    """Time that the server has for the last line, and its place among the lines of that time."""


@dataclass
class PodLogs:
    """The logs of a submission."""

    submission: Submission
    _containers: dict[str, ContainerLog] = field(default_factory=dict)
    _since: str | None = None

    def new_lines(self) -> list[str]:
        """What came since the last call, in the order of its times. Raises SubmitError where the cluster is away."""
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
                lines.append((log.when, f"[{log.label}] {text}"))
        for container, here in places.items():
            self._containers[container].last = max(here, self._containers[container].last)
        if not any(line.startswith("error:") and "waiting to start" not in line for line in said):
            self._since = self._newest() or self._since  # of all: nothing that one lacks is skipped
        return [line for _, line in sorted(lines, key=lambda line: line[0])]

    def _newest(self) -> str | None:
        """The time up to which all was read."""
        times = [datetime.fromisoformat(log.last[0]) for log in self._containers.values() if log.last[0]]
        return (max(times) - _MARGIN).isoformat(timespec="seconds") if times else None
