"""The time that is left of a stage."""

import pytest

from clm_dist.pace import Pace


def test_it_falls_by_the_clock_between_reports_and_never_rises() -> None:
    pace = Pace()
    pace.enter(0)
    for step in range(5):
        pace.reach(step, 10.0 * step)
    # Step 4 was done at 40; ten seconds a step.
    assert [pace.seconds_left(10, now) for now in (40, 41, 45, 50, 90, 100, 500)] == [60, 59, 55, 50, 10, 0, 0]


def test_it_is_unknown_before_a_unit_is_done() -> None:
    pace = Pace()
    pace.enter(0)
    assert pace.seconds_left(10, 1) is None
    pace.reach(3, 5)
    assert pace.seconds_left(10, 6) is None
    pace.reach(4, 15)
    assert pace.seconds_left(10, 15) == 60


def test_it_follows_the_speed_of_the_last_five_minutes() -> None:
    pace = Pace()
    pace.enter(0)
    for step in range(61):
        pace.reach(step, 10.0 * step)
    for step in range(61, 1000):
        now = 600 + step - 60
        pace.reach(step, now)
        if now == 750:
            # 150 steps of 1 s, 15 of 10 s.
            assert pace.seconds_left(2000, now) == pytest.approx((2000 - step) * 300 / 165, rel=0.05)
    assert pace.seconds_left(2000, now) == pytest.approx(1001)


def test_many_units_a_second_are_kept_in_few_marks() -> None:
    pace = Pace()
    pace.enter(0)
    for step in range(100_000):
        pace.reach(step, step / 100)
    assert pace.seconds_left(200_000, 999.99) == pytest.approx(1000, rel=1e-3)
    assert len(pace._marks) < 1000


def test_what_is_done_at_once_does_not_count_for_the_speed() -> None:
    pace = Pace()
    pace.enter(0)
    for done in range(1, 9):
        pace.reach(done, 5.0)
    assert pace.seconds_left(100, 5) is None
    for done in range(9, 17):
        pace.reach(done, 15.0)
    assert pace.seconds_left(96, 15) == 100


def test_evaluations_are_spread_over_the_steps() -> None:
    pace = Pace()
    now = 0.0
    for start in (0, 100, 200):
        pace.enter(now)
        pace.reach(start, now)
        for step in range(start + 1, start + 101):
            now += 10
            pace.reach(step, now)
        pace.leave(now)
        now += 500
    # Every 100 steps take 1,000 s of training and 500 s of evaluation.
    pace.enter(now)
    pace.reach(300, now)
    assert pace.seconds_left(400, now) == pytest.approx(1500)


def test_what_begins_again_forgets_how_fast_it_was() -> None:
    pace = Pace()
    pace.enter(0)
    pace.reach(0, 0)
    pace.reach(100, 1000)
    pace.leave(1000)
    pace.enter(5000)
    pace.reach(50, 5000)
    assert pace.seconds_left(100, 5000) is None
    pace.reach(51, 5001)
    assert pace.seconds_left(100, 5001) == 49
