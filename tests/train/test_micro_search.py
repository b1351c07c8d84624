"""The arithmetic of the search for the blocks of a pass."""

from collections.abc import Callable
from typing import Any

import pytest

from clm_dist.config.job import BatchConfig
from clm_dist.train.micro_search import Found, Searched, next_size
from clm_dist.train.rehearsal import Tried
from tests.conftest import MakeJob


def search(
    memory_of: Callable[[int], float], *, most: int, device: float = 1000, speed_of: Any = None, on_gpu: bool = True
) -> Found:
    """What is tried where a step of so many blocks takes so much memory, of a device that has 1,000."""
    found: Found = {}
    size: int | None = 1
    while size is not None:
        memory = memory_of(size)
        assert on_gpu or memory <= device, "on a CPU the process is killed"
        fits = memory <= device
        found[size] = Tried(speed_of(size) if speed_of else 1.0, int(memory)) if fits else None
        size = next_size(found, most, 0.9 * device, on_gpu=on_gpu)
    return found


@pytest.fixture
def searched(make_job: MakeJob) -> Callable[..., Searched]:
    """What was found in a search of a job whose step has so many blocks for a worker."""

    def searched(found: Found, *, in_step: int = 10_000, on_gpu: bool = True) -> Searched:
        return Searched(found, make_job("batch.micro_size=auto", f"batch.global_size={in_step}"), 900, on_gpu)

    return searched


@pytest.mark.parametrize("each", [0.5, 3, 20, 120, 500])
def test_on_a_gpu_the_most_that_fit_are_found_with_few_tries(each: float, searched: Callable[..., Searched]) -> None:
    found = search(lambda size: 100 + each * size, most=10_000)
    # A tenth of the memory is left.
    largest = max(1, int(800 / each))
    best = searched(found).best
    assert best is not None
    assert largest - largest // 8 <= best <= largest
    assert len(found) <= 5
    # Nothing is known of a second block before it is tried.
    assert (None in found.values()) == (largest == 1)


def test_no_more_are_tried_than_a_step_has() -> None:
    found = search(lambda size: 100 + size, most=24)
    assert list(found) == [1, 2, 24]
    assert list(search(lambda size: 100 + size, most=1)) == [1]


def test_what_does_not_fit_is_halved(searched: Callable[..., Searched]) -> None:
    # Above 20 blocks it takes a buffer that the first tries do not show.
    found = search(lambda size: 100 + size + (900 if size > 20 else 0), most=1000)
    assert found[32] is None
    best = searched(found).best
    assert best is not None and 18 <= best <= 20
    assert len(found) <= 8
    nothing = search(lambda size: 2000, most=8)
    assert (nothing, searched(nothing).best) == ({1: None}, None)


def test_on_a_cpu_the_fastest_is_taken_and_no_memory_risked(searched: Callable[..., Searched]) -> None:
    speeds = {1: 10.0, 2: 18.0, 4: 25.0, 8: 25.5, 16: 40.0}
    found = search(lambda size: size, most=100, speed_of=speeds.__getitem__, on_gpu=False)
    # It does not look for what comes after a step that is no faster.
    assert list(found) == [1, 2, 4, 8]
    assert searched(found, on_gpu=False).best == 8
    slower = search(lambda size: size, most=100, speed_of=lambda size: -abs(size - 4), on_gpu=False)
    assert (list(slower), searched(slower, on_gpu=False).best) == ([1, 2, 4, 8], 4)
    risky = search(lambda size: 100 + 100 * size, most=100, speed_of=float, on_gpu=False)
    assert list(risky) == [1, 2, 4]
    assert searched(risky, on_gpu=False).describe(4).endswith("4 blocks, as many as memory allows; tried 1, 2, 4")


def test_the_line_says_why(searched: Callable[..., Searched]) -> None:
    def line(sizes: dict[int, bool], size: int, **options: Any) -> str:
        found = {each: Tried(float(each), each) if fits else None for each, fits in sizes.items()}
        return searched(found, **options).describe(size).removeprefix("batch.micro_size: ")

    fit = {1: True, 2: True, 32: False, 17: True}
    assert line(fit, 17) == "a pass has 17 blocks, the most that fit; tried 1, 2, 32 (does not fit), 17"
    whole = "a pass has 2 blocks, as many as leave each worker a pass of a step; tried 1, 2"
    assert line({1: True, 2: True}, 2, in_step=2) == whole
    even = "a pass has 6 blocks, which makes as few passes as 8, the fastest; tried 1, 2, 4, 8"
    assert line({1: True, 2: True, 4: True, 8: True}, 6, on_gpu=False) == even
    assert line({1: True, 2: False}, 1) == "a pass has 1 block, the most that fit; tried 1, 2 (does not fit)"


def test_a_step_has_no_more_passes_than_needed_and_they_are_even() -> None:
    batch = BatchConfig(global_size=24, micro_size="auto")
    # One pass of each of two workers; two of 6; three of 4, where five fit; and so on.
    assert [batch.even_micro_size(most, 2) for most in (12, 8, 6, 5, 4, 3, 2, 1)] == [12, 6, 6, 4, 4, 3, 2, 1]
    for most in range(1, 13):
        even = batch.even_micro_size(most, 2)
        passes = [batch.model_copy(update={"micro_size": size}).passes_per_step(2) for size in (most, even)]
        assert even <= most
        assert passes[0] == passes[1]
