"""Curves and marks of any length in bounded memory, with no extreme of a curve lost."""

import math
from dataclasses import dataclass, field
from itertools import zip_longest

MOST_BUCKETS = 1000
"""Of a curve: about a pixel each."""
MOST_MARKS = 500


class Bucket:
    """Consecutive points of a curve, by their extremes."""

    __slots__ = ("bad", "bad_x", "high", "high_x", "low", "low_x", "points", "total", "total_x")

    def __init__(self) -> None:
        self.points = self.bad = 0
        self.total = self.total_x = 0.0
        self.low, self.high = math.inf, -math.inf
        self.low_x = self.high_x = self.bad_x = math.nan

    def add(self, x: float, y: float | None) -> None:
        """Add the point that follows."""
        self.points += 1
        if y is None or not math.isfinite(y):
            if not self.bad:
                self.bad_x = x
            self.bad += 1
            return
        self.total += y
        self.total_x += x
        if y < self.low:
            self.low, self.low_x = y, x
        if y > self.high:
            self.high, self.high_x = y, x

    def take(self, other: "Bucket") -> None:
        """Add the points of the bucket that follows."""
        if other.bad and not self.bad:
            self.bad_x = other.bad_x
        if other.low < self.low:
            self.low, self.low_x = other.low, other.low_x
        if other.high > self.high:
            self.high, self.high_x = other.high, other.high_x
        self.points += other.points
        self.bad += other.bad
        self.total += other.total
        self.total_x += other.total_x


class Curve:
    """A curve as it comes, point by point: at most MOST_BUCKETS buckets, each of equally many neighbours.

    The lowest and the highest point of every bucket survive, and so does the first point that has no finite value.
    """

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self.each = 1
        """Points of a bucket, a power of two; the last may have fewer."""

    def add(self, x: float, y: float | None) -> None:
        """Add a point, at the right of those before; None and numbers that are not finite are points without value."""
        buckets = self._buckets
        if not buckets or buckets[-1].points == self.each:
            if len(buckets) == MOST_BUCKETS:
                for first, second in zip(buckets[::2], buckets[1::2], strict=True):
                    first.take(second)
                del buckets[1::2]
                self.each *= 2
            buckets.append(Bucket())
        buckets[-1].add(x, y)

    def points(self) -> list[tuple[float, float]]:
        """The points that survive, from left to right: at most two a bucket."""
        points = []
        for bucket in self._buckets:
            if bucket.bad < bucket.points:
                points += sorted({(bucket.low_x, bucket.low), (bucket.high_x, bucket.high)})
        return points

    def means(self) -> list[tuple[float, float]]:
        """The mean of the points with values of each bucket that has some."""
        counted = ((bucket, bucket.points - bucket.bad) for bucket in self._buckets)
        return [(bucket.total_x / count, bucket.total / count) for bucket, count in counted if count]

    def without_value(self) -> list[tuple[float, int]]:
        """Where points have no value: of each bucket that has such, the first, and their number."""
        return [(bucket.bad_x, bucket.bad) for bucket in self._buckets if bucket.bad]


@dataclass
class Mark:
    """Something that happened at a step."""

    step: int
    text: str
    also: int = 0
    """How many more of its kind followed, which this mark stands for."""


@dataclass
class Marks:
    """What happened of one kind, in the order of the steps: at most MOST_MARKS marks."""

    marks: list[Mark] = field(default_factory=list)
    count: int = 0
    _each: int = 1

    def add(self, step: int, text: str) -> None:
        self.count += 1
        if self.marks and self.marks[-1].also + 1 < self._each:
            self.marks[-1].also += 1
            return
        if len(self.marks) == MOST_MARKS:
            joined = zip_longest(self.marks[::2], self.marks[1::2])
            self.marks = [Mark(one.step, one.text, one.also + other.also + 1) for one, other in joined]
            self._each *= 2
        self.marks.append(Mark(step, text))
