"""Ranks that evaluate ask each other about once a second whether one of them is to stop."""

import itertools
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
    check = StopCheck(cast(Reporter, Wishing()), lambda values: values)
    for _ in range(2):
        for number in range(1, 6):
            clock[0] += 0.001
            check.is_asked(number)
        assert check._due > 5


def test_what_one_rank_is_asked_ends_the_evaluation(clock: list[float]) -> None:
    wishing = Wishing()
    wishing.stop = True
    assert passes_with_a_look([0.01] * 100, clock, wishing) == [1]
