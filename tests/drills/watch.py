"""What a fault costs a job."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class Watched(Protocol):
    """A job whose run can be watched while it goes on."""

    def starts(self) -> list[tuple[int, int]]: ...
    def last_step(self) -> int: ...
    def wait_until(self, condition: Callable[[], Any]) -> float: ...


J = TypeVar("J", bound=Watched)


@dataclass(frozen=True)
class Seen(Generic[J]):
    """What a drill found."""

    job: J
    steps_lost: int
    """Finished ones that were computed again."""
    seconds_lost: float
    """From what happened to the next step that was not there before."""


def watch(job: J) -> Seen[J]:
    """From something that has just happened to the next step that was not there before."""
    happened = time.monotonic()
    number, last = len(job.starts()), job.last_step()

    def goes_on() -> bool:
        nonlocal last
        if len(job.starts()) == number:
            last = max(last, job.last_step())
            return False
        return job.last_step() > last

    went_on = job.wait_until(goes_on)
    return Seen(job, max(0, last - job.starts()[number][0]), went_on - happened)
