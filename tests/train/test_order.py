"""The permutation of the blocks."""

import time

import numpy as np
import pytest

from clm_dist.train.order import permute


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4096, 4097, 99_991, 100_000])
def test_every_block_comes_once_an_epoch(size: int) -> None:
    for seed, epoch in ((0, 0), (42, 1), (2**40, 7)):
        assert np.array_equal(np.sort(permute(np.arange(size), size, seed, epoch)), np.arange(size))


def test_any_slice_is_that_of_the_whole() -> None:
    whole = permute(np.arange(10_007), 10_007, 1, 2)
    assert np.array_equal(permute(np.arange(500, 600), 10_007, 1, 2), whole[500:600])
    assert np.array_equal(permute(np.array([7, 3, 10_006]), 10_007, 1, 2), whole[[7, 3, 10_006]])


def test_epochs_and_seeds_give_unrelated_orders() -> None:
    size = 20_000
    base = permute(np.arange(size), size, 42, 0)
    for seed, epoch in ((42, 1), (43, 0), (0, 42)):
        other = permute(np.arange(size), size, seed, epoch)
        # Of two random orders about one place agrees; the correlation is about 1 / sqrt(size) = 0.007.
        assert np.sum(base == other) < 10
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
        assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.03


def test_places_are_uniform() -> None:
    size, draws = 16, 4000
    seen = np.zeros((size, size))
    for epoch in range(draws):
        seen[np.arange(size), permute(np.arange(size), size, 5, epoch)] += 1
    expected = draws / size
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    # 225 degrees of freedom: mean 225, standard deviation 21.
    assert chi_squared < 225 + 6 * 21


def test_a_far_step_of_a_huge_run_is_reached_at_once() -> None:
    began = time.perf_counter()
    far = permute(np.arange(9_999_999_000, 9_999_999_512), 10**10, 3, 4)
    assert time.perf_counter() - began < 0.1
    assert len(np.unique(far)) == 512
    assert far.min() >= 0
    assert far.max() < 10**10
