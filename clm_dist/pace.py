"""The time that is left of a stage, from how fast it has gone."""

from collections import deque

_WINDOW_S = 300.0
_SPACING_S = 1.0


class Pace:
    """How fast a stage goes on. Times are seconds of a monotonic clock.

    The speed is that of the last five minutes. The time for which the stage gave way to others, as training does to
    evaluations, is spread over all of its units, because the rest of it will give way as often.
    """

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()
        """Seconds of the stage's own, and the units that were done by then."""
        self._began = self._first = 0.0
        self._away = 0.0
        self._left_at: float | None = None
        # One tuple, because a display reads it in a thread of its own.
        self._estimate: tuple[float, float, float] | None = None
        """Seconds a unit, the units that were done, and when."""

    def leave(self, now: float) -> None:
        """Another stage begins."""
        self._left_at = now

    def enter(self, now: float) -> None:
        """The stage begins, or goes on after another one."""
        if self._left_at is not None and self._marks:
            self._away += now - self._left_at
        self._left_at = self._estimate = None

    def reach(self, done: float, now: float) -> None:
        """`done` units are done; fewer than before begin anew."""
        if not self._marks or done < self._marks[-1][1]:
            self._marks.clear()
            self._began, self._away, self._estimate = now, 0.0, None
        own = now - self._away
        if own - self._began < _SPACING_S:
            # What is done at once was done before, or comes in batches: it does not tell the speed.
            self._marks.clear()
            self._first = done
        elif len(self._marks) > 1 and own - self._marks[-2][0] < _SPACING_S:
            self._marks.pop()
        self._marks.append((own, done))
        while len(self._marks) > 2 and self._marks[1][0] <= own - _WINDOW_S:
            self._marks.popleft()
        begin, before = self._marks[0]
        if done > before:
            each = (own - begin) / (done - before) + self._away / (done - self._first)
            self._estimate = each, done, now

    def seconds_left(self, total: float, now: float) -> float | None:
        """Seconds until `total` units are done; None while the speed is not known.

        Between two calls of `reach` it falls by the clock, down to zero.
        """
        if self._estimate is None:
            return None
        each, done, at = self._estimate
        return max(0.0, (total - done) * each - (now - at))
