"""How far a run is, from its records: what it has taken, and what is left of it at its present speed."""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from clm_dist.files.record_types import Record, StartRecord, StepRecord
from clm_dist.files.spent import Spent

RECENT_STEPS = 50
"""Steps of which the time that is left is estimated."""


@dataclass
class Standing:
    """What a run has taken until now."""

    spent: Spent = field(default_factory=Spent)
    step: int = 0
    num_steps: int = 0
    """Steps of the whole run; 0 where no worker has begun."""
    tokens: int = 0
    step_seconds: float = 0.0
    """Seconds in steps, without evaluations and starts."""
    peak_memory: int = 0
    """Bytes of rank 0."""
    began: float | None = None
    """When the first workers began, seconds since the epoch."""
    machines: set[tuple[int, str]] = field(default_factory=set)
    """The numbers of workers on which it was trained, each with the device."""
    stopped_early: bool = False
    """Whether training ended before its last step, because the loss no longer fell."""
    num_evals: int = 0
    last_eval: float | None = None
    """Loss of the last evaluation; of a run that is done, that of the weights that are kept."""
    _evals: dict[int, float] = field(default_factory=dict)
    """Losses by step."""
    _eval_seconds: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Standing":
        """Return the standing of a run with these records."""
        standing = cls()
        for record in records:
            standing.add(record)
        return standing

    def add(self, record: Record) -> None:
        """Count a record; they come in the order of the file."""
        self.spent.add(record)
        if record["kind"] == "step":
            self._add_step(record)
        elif record["kind"] == "start":
            self._add_start(record)
        elif record["kind"] in ("eval", "verify"):
            self.num_evals += 1
            self._eval_seconds += record.get("seconds", 0.0)
            if record["kind"] == "eval":
                self.last_eval = self._evals[record["step"]] = record["loss"]
        elif record["kind"] == "final":
            self.last_eval = self._evals.get(record["kept"], self.last_eval)
            self.stopped_early = record["stopped_early"]

    @property
    def seconds(self) -> float:
        """Seconds that the run has taken since its driver began, without the time between two starts by hand."""
        return sum(self.spent.seconds.values())

    def seconds_left(self, num_evaluations: int) -> float | None:
        """Seconds until the run is done; None before its first step.

        Args:
            num_evaluations: evaluations of the whole run.
        """
        if not self._recent:
            return None
        each = self._eval_seconds / self.num_evals if self.num_evals else 0.0
        evaluations = max(0, num_evaluations - self.num_evals) * each
        return (self.num_steps - self.step) * statistics.median(self._recent) + evaluations

    def _add_step(self, record: StepRecord) -> None:
        self.step = record["step"]
        self.tokens += record["tokens"]
        self.step_seconds += record["seconds"]
        self.peak_memory = max(self.peak_memory, record.get("memory_bytes", 0))
        self._recent.append(record["seconds"])

    def _add_start(self, record: StartRecord) -> None:
        self.step, self.num_steps = record["step"], record["num_steps"]
        self.began = self.began or record.get("time")  # none in those of earlier versions
        self.machines.add((record["workers"], record["device"]))
        self.stopped_early = False  # of an earlier job, after which the run goes on
        self._recent.clear()
