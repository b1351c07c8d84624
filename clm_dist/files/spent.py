"""Where the time of a run went, from its records."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Literal

from clm_dist.files.record_types import Record

Part = Literal["compute", "data", "checkpoint", "evaluation", "model", "start-up", "restarts", "other"]
PARTS: dict[Part, str] = {
    "compute": "forward, backward and update",
    "data": "rank 0 waits for blocks",
    "checkpoint": "training waits for a checkpoint",
    "evaluation": "evaluations on the way",
    "model": "the model is written, read back and evaluated",
    "start-up": "from the start of the driver to the first step",
    "restarts": "until workers trained again, and steps that were trained again",
    "other": "all else until the last record with a time",
}


@dataclass
class Spent:
    """The seconds of each part; records of earlier versions have no times of evaluations and starts."""

    seconds: dict[Part, float] = field(default_factory=lambda: defaultdict(float))
    is_whole: bool = True
    """Whether evaluations and starts have their times."""
    _started: bool = False
    _since: float | None = None
    """Time of the last record that has one."""
    _counted: float = 0.0
    """Seconds since then that are of some part."""
    _writing: bool = False

    def add(self, record: Record) -> None:
        """Count a record; they come in the order of the file."""
        if record["kind"] == "step":
            data = min(record["data_wait"], record["seconds"])
            self._count("data", data)
            self._count("compute", record["seconds"] - data)
        elif record["kind"] == "checkpoint":
            # Within the next steps, for the most part.
            waited = min(record.get("blocked", 0.0), self.seconds["compute"])
            self.seconds["checkpoint"] += waited
            self.seconds["compute"] -= waited
        elif record["kind"] in ("eval", "verify"):
            self.is_whole &= "seconds" in record
            self._count("model" if record["kind"] == "verify" else "evaluation", record.get("seconds", 0.0))
        elif record["kind"] == "start":
            part: Part = "restarts" if self._started else "start-up"
            self.seconds[part] += record.get("startup", 0.0) + record.get("lost", 0.0)
            self._started, self._since, self._counted = True, record.get("time"), 0.0
        elif record["kind"] == "failure":
            self._since = None  # the steps that are lost have left the records
        elif record["kind"] == "phase" and (now := record.get("time")) is not None:
            if self._since is not None:
                self.seconds["model" if self._writing else "other"] += max(0.0, now - self._since - self._counted)
            self._since, self._counted = now, 0.0
            self._writing = record["phase"].startswith("Writing")

    def _count(self, part: Part, seconds: float) -> None:
        self.seconds[part] += seconds
        self._counted += seconds

    def parts(self) -> list[tuple[Part, float]]:
        """The parts that took time, in the order of PARTS."""
        return [(part, self.seconds[part]) for part in PARTS if self.seconds.get(part, 0.0) >= 0.05]
