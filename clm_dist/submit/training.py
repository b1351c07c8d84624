"""How far a run has trained, from its records, or from a log where its records are on a disk that is not seen here."""

import contextlib
import json
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from clm_dist.files.record_types import Record, StartRecord, StepRecord
from clm_dist.files.standing import RECENT_STEPS

MARK = "clm-dist training: "
"""Begins the text of a line that is for programs."""


@dataclass(frozen=True)
class Training:
    """How far a run has trained."""

    step: int
    num_steps: int
    """Steps of the whole run."""
    loss: float | None = None
    """Loss of the last step."""
    seconds_left: float | None = None
    """Estimated from the last steps; does not include evaluations."""
    planned: str | None = None
    """What `against_plan.describe_time` says, where the records and the plan are on a disk that is not seen here."""

    @classmethod
    def of_records(cls, records: Iterable[Record]) -> "Training | None":
        """From the records of a run, or those that `recent` keeps; None if no worker has begun."""
        start: StartRecord | None = None
        steps: list[StepRecord] = []
        for record in recent(records):
            if record["kind"] == "start":
                start = record
            elif record["kind"] == "step":
                steps.append(record)
        if start is None:
            return None
        num_steps = start["num_steps"]
        if not steps:
            return cls(start["step"], num_steps)
        each = statistics.median(record["seconds"] for record in steps)
        step = steps[-1]["step"]
        return cls(step, num_steps, steps[-1]["loss"], (num_steps - step) * each)

    def as_line(self) -> str:
        """The text of a log's line, from which `of_lines` makes this again."""
        fields = asdict(self)
        if self.planned is None:
            del fields["planned"]  # which an earlier version does not know
        return f"{MARK}{json.dumps(fields)}"

    @classmethod
    def of_lines(cls, lines: Iterable[str]) -> "Training | None":
        """The last that stands in a log, or None; what another version wrote otherwise is passed over."""
        found = None
        for line in lines:
            _, mark, fields = line.partition(MARK)
            if mark:
                with contextlib.suppress(ValueError, TypeError):
                    found = cls(**json.loads(fields))
        return found


def recent(records: Iterable[Record]) -> list[Record]:
    """The records that say how far a run is: the last start and the last steps."""
    starts: deque[Record] = deque(maxlen=1)
    steps: deque[Record] = deque(maxlen=RECENT_STEPS)
    for record in records:
        if record["kind"] == "start":
            starts.append(record)
        elif record["kind"] == "step":
            steps.append(record)
    return [*starts, *steps]
