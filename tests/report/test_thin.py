"""Curves and marks that are thinned."""

import math
from random import Random

import pytest

from clm_dist.report.thin import MOST_BUCKETS, MOST_MARKS, Curve, Marks

SIZES = [1, 2, MOST_BUCKETS, MOST_BUCKETS + 1, 2 * MOST_BUCKETS + 1, 12_345, 50_000]


def noise(num_points: int) -> list[float | None]:
    """Values of which one in eleven is missing or not finite."""
    random = Random(num_points)
    wrong = (None, math.nan, math.inf, -math.inf)
    return [random.choice(wrong) if random.random() < 1 / 11 else random.gauss(0, 1) for _ in range(num_points)]


def curve_of(values: list[float | None]) -> Curve:
    curve = Curve()
    for x, y in enumerate(values):
        curve.add(x, y)
    return curve


def buckets(values: list[float | None], each: int) -> list[list[tuple[int, float | None]]]:
    points = list(enumerate(values))
    return [points[first : first + each] for first in range(0, len(points), each)]


@pytest.mark.parametrize("num_points", SIZES)
def test_the_lowest_and_the_highest_point_of_every_bucket_survive(num_points: int) -> None:
    values = noise(num_points)
    curve = curve_of(values)
    assert curve.each == 2 ** max(0, math.ceil(math.log2(num_points / MOST_BUCKETS)))
    kept = curve.points()
    assert [x for x, _ in kept] == sorted({x for x, _ in kept})
    expected = set()
    for bucket in buckets(values, curve.each):
        if good := [(y, x) for x, y in bucket if y is not None and math.isfinite(y)]:
            expected |= {min(good), max(good)}
    assert {(y, x) for x, y in kept} == expected
    assert len(kept) <= 2 * MOST_BUCKETS


@pytest.mark.parametrize("num_points", SIZES)
def test_values_that_are_not_finite_are_counted_where_they_begin(num_points: int) -> None:
    values = noise(num_points)
    curve = curve_of(values)
    expected = []
    for bucket in buckets(values, curve.each):
        if bad := [x for x, y in bucket if y is None or not math.isfinite(y)]:
            expected.append((bad[0], len(bad)))
    assert curve.without_value() == expected


@pytest.mark.parametrize("num_points", SIZES)
def test_means_are_those_of_the_values_of_each_bucket(num_points: int) -> None:
    values = noise(num_points)
    curve = curve_of(values)
    expected = []
    for bucket in buckets(values, curve.each):
        if good := [(x, y) for x, y in bucket if y is not None and math.isfinite(y)]:
            expected.append(tuple(sum(axis) / len(good) for axis in zip(*good, strict=True)))
    assert len(curve.means()) == len(expected)
    for (x, y), wanted in zip(curve.means(), expected, strict=True):
        assert (x, y) == pytest.approx(wanted)


def test_a_spike_anywhere_survives() -> None:
    for place in (0, 1, 4_999, 49_998, 49_999):
        values: list[float | None] = [1.0] * 50_000
        values[place] = 99.0
        assert (place, 99.0) in curve_of(values).points()


@pytest.mark.parametrize("count", [1, MOST_MARKS, MOST_MARKS + 1, 7 * MOST_MARKS + 3])
def test_each_mark_is_there_or_counted_by_the_one_before(count: int) -> None:
    marks = Marks()
    for step in range(count):
        marks.add(step, f"mark {step}")
    assert len(marks.marks) <= MOST_MARKS
    assert sum(mark.also + 1 for mark in marks.marks) == count
    next_step = 0
    for mark in marks.marks:
        assert (mark.step, mark.text) == (next_step, f"mark {next_step}")
        next_step += mark.also + 1
