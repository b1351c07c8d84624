"""On what the time of a command is spent."""

import time
from collections import defaultdict
from itertools import accumulate, pairwise
from typing import Literal

Kind = Literal["start", "prepare", "training", "evaluation", "checkpoints", "model", "end"]
_NAMES: dict[Kind, str] = {
    "start": "starting",
    "prepare": "preparing",
    "training": "training",
    "evaluation": "evaluating",
    "checkpoints": "waiting for checkpoints",
    "model": "writing the model",
    "end": "the rest",
}


class Times:
    """The seconds of each kind, from the making of this object on. Each moment is of one kind, so they add up."""

    def __init__(self) -> None:
        self.seconds: defaultdict[Kind, float] = defaultdict(float)
        self._kind: Kind = "start"
        self._since = time.monotonic()

    def begin(self, kind: Kind | None = None) -> None:
        """What follows is of this kind; None goes on with the kind before."""
        now = time.monotonic()
        self.seconds[self._kind] += now - self._since
        self._kind, self._since = kind or self._kind, now

    def move(self, kind: Kind, seconds: float) -> None:
        """Count seconds of the present kind, at most all of it, as those of another."""
        self.begin()
        seconds = min(seconds, self.seconds[self._kind])
        self.seconds[self._kind] -= seconds
        self.seconds[kind] += seconds

    def describe(self) -> str:
        """The whole until now and its parts of a second and more: `1:05 (starting 0:24, training 0:41)`."""
        self.begin()
        # Rounded where they meet, the parts add up to the rounded whole.
        ends = [round(end) for end in accumulate((self.seconds[kind] for kind in _NAMES), initial=0.0)]
        parts = [(name, end - begin) for name, (begin, end) in zip(_NAMES.values(), pairwise(ends), strict=True)]
        return f"{clock(ends[-1])} ({', '.join(f'{name} {clock(part)}' for name, part in parts if part)})"


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
