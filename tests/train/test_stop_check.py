"""Ranks that evaluate ask each other about once a second whether one of them is to stop."""

import itertools
from functools import partial
from typing import cast

import pytest

from clm_dist.train.checkpointing.reporter import Reporter, StopCheck, Wish


class Wishing:
    """A rank's reporter that wishes to stop from the moment on at which it is told to."""

    stop = False

    def wishes(self) -> Wish:
        return Wish(stop=self.stop)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("clm_dist.train.checkpointing.reporter.time.perf_counter", lambda: now[0])
    return now


def passes_with_a_look(seconds_a_pass: list[float], clock: list[float], reporter: Wishing | None = None) -> list[int]:
    """After which passes of an evaluation the ranks asked each other; the other rank takes twice as long."""
    asked: list[int] = []

    def all_reduce(values: list[float]) -> list[float]:
        asked.append(number)
        stop, milliseconds, one = values
        return [stop, 3 * milliseconds, 2 * one]

    check = StopCheck(cast(Reporter, reporter or Wishing()), all_reduce)
    for number, seconds in enumerate(seconds_a_pass, 1):
        clock[0] += seconds
        if check.is_asked(number):
            break
    return asked


def test_slow_passes_are_all_followed_by_a_look(clock: list[float]) -> None:
    assert passes_with_a_look([2.0] * 6, clock) == [1, 2, 3, 4, 5, 6]


def test_of_fast_passes_there_is_a_look_a_second(clock: list[float]) -> None:
    # 10 ms here, 20 ms there: 15 ms, so about 66 passes a second, once they are known to be fast.
    looks = passes_with_a_look([0.01] * 1000, clock)
    assert looks[:8] == [1, 2, 4, 8, 16, 32, 64, 128]
    assert all(60 <= later - earlier <= 68 for earlier, later in itertools.pairwise(looks[7:]))


def test_every_evaluation_begins_with_a_look(clock: list[float]) -> None:
    asked: list[int] = []

    def all_reduce(values: list[float]) -> list[float]:
        asked.append(number)
        return values

    check = StopCheck(cast(Reporter, Wishing()), all_reduce)
    for _ in range(2):
        for number in range(1, 6):
            clock[0] += 0.001
            check.is_asked(number)
    assert asked == [1, 2, 4, 1, 2, 4]


@pytest.mark.parametrize("speeds", [(0.01, 0.5), (0.3, 0.0001), (1.7, 0.2)])
def test_ranks_of_other_speeds_look_after_the_same_passes(speeds: tuple[float, float], clock: list[float]) -> None:
    """Each goes on alone until it asks; then all have to."""
    given: list[list[float]] = [[], []]
    told: list[float] | None = None

    def waiting(rank: int, values: list[float]) -> list[float]:
        given[rank] = values
        return told if told else values

    checks = [StopCheck(cast(Reporter, Wishing()), partial(waiting, rank)) for rank in (0, 1)]
    for number in range(1, 200):
        # Once to see what each rank says, on copies; once with the sums that both are given.
        given, told = [[], []], None
        states = [(check._due, check._began) for check in checks]
        for again in (False, True):
            for rank, (check, seconds) in enumerate(zip(checks, speeds, strict=True)):
                check._due, check._began = states[rank]
                clock[0] = number * seconds
                check.is_asked(number)
            asked = [bool(values) for values in given]
            assert asked[0] == asked[1]
            if again or not all(asked):
                break
            told = [sum(pair) for pair in zip(*given, strict=True)]
        assert checks[0]._due == checks[1]._due


def test_what_one_rank_is_asked_ends_the_evaluation(clock: list[float]) -> None:
    wishing = Wishing()
    wishing.stop = True
    assert passes_with_a_look([0.01] * 100, clock, wishing) == [1]
