"""The permutation of the blocks: no block twice, any place at once, and nothing that tells it from a random order.

A statistic is given as the probability that random orders are as far from their mean, so a wrong alarm is a matter of
the bound: `NEVER` for each of the fewer than 5,000 statistics here makes less than 1e-6 for all of them. Seeds are
fixed, so a test that passes once passes always. That they can fail is tested too, on orders that are broken.
"""

import itertools
import math
import sys
import tracemalloc
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from clm_dist.train import order
from clm_dist.train.batches import BatchOrder
from clm_dist.train.order import permute

Array = npt.NDArray[np.int64]
Permute = Callable[[Array, int, int, int], Array]

NEVER = 1e-10
LARGEST_SEED = 2**32 - 1
HUGE = 10**10
SMALL_SIZES = [*range(1, 301)]
AROUND_POWERS = [2**power + near for power in range(8, 17) for near in (-1, 0, 1)]
OTHER_SIZES = np.random.default_rng(0).integers(301, 100_000, 120).tolist()


def check_bijection(sizes: Iterable[int]) -> None:
    for size in sizes:
        seed, epoch = ((0, 0), (42, 1), (LARGEST_SEED, 7), (2**40, 2))[size % 4]
        seen = np.zeros(size, dtype=bool)
        places = permute(np.arange(size), size, seed, epoch)
        assert places.min() >= 0
        seen[places] = True
        assert seen.all(), size


def test_every_block_comes_once_an_epoch() -> None:
    check_bijection([*SMALL_SIZES, *AROUND_POWERS, 99_999, 100_000, *OTHER_SIZES])


@pytest.mark.long
def test_every_block_comes_once_an_epoch_at_every_seventh_size_up_to_100_000() -> None:
    check_bijection(range(1, 100_001, 7))


def undone(values: Array, size: int, seed: int, epoch: int) -> Array:
    """The indices that the network put at these values."""
    bits = (size - 1).bit_length()
    low_bits, high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    low_mask, high_mask = np.uint64(2 ** int(low_bits) - 1), np.uint64(2 ** int(high_bits) - 1)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(order._ROUNDS, np.uint64)
    keys = keys + np.arange(order._ROUNDS, dtype=np.uint64) * order._GOLDEN
    found = values.astype(np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        high, low = found[outside] >> low_bits, found[outside] & low_mask
        for number in reversed(range(order._ROUNDS)):
            if number % 2:
                low = (low - order._hash(high, keys[number])) & low_mask
            else:
                high = (high - order._hash(low, keys[number])) & high_mask
        found[outside] = (high << low_bits) | low
        outside = found >= size
    return found.astype(np.int64)


@pytest.mark.parametrize("size", [5000, 8192, 99_991, 2**33, 2**33 + 1, HUGE, 2**40 - 1])
@pytest.mark.parametrize("seed", [0, 42, LARGEST_SEED])
def test_the_network_can_be_undone(size: int, seed: int) -> None:
    some = np.random.default_rng(size).integers(0, size, 20_000)
    there = permute(some, size, seed, 3)
    assert there.min() >= 0
    assert there.max() < size
    # One-to-one, and onto.
    assert np.array_equal(undone(there, size, seed, 3), some)
    assert np.array_equal(permute(undone(some, size, seed, 3), size, seed, 3), some)


def test_many_places_of_ten_billion_blocks_are_as_many_blocks() -> None:
    places = permute(np.arange(HUGE - 200_000, HUGE), HUGE, 3, 4)
    assert len(np.unique(places)) == 200_000
    assert places.min() >= 0
    assert places.max() < HUGE


@pytest.mark.parametrize("size", [1000, 4096, 4097, 10_007])
def test_any_slice_is_that_of_the_whole(size: int) -> None:
    whole = permute(np.arange(size), size, 1, 2)
    assert np.array_equal(permute(np.arange(500, 600), size, 1, 2), whole[500:600])
    assert np.array_equal(permute(np.array([7, 3, size - 1]), size, 1, 2), whole[[7, 3, size - 1]])


@pytest.mark.parametrize("num_blocks", [4096, 4097, 10**6, HUGE])
def test_step_a_million_costs_as_much_as_the_first(num_blocks: int) -> None:
    batches = BatchOrder(num_blocks, global_size=512, micro_size=8, epochs=10**6, max_steps=None, seed=42)
    calls = itertools.count()
    tracemalloc.start()
    sys.setprofile(lambda *_: next(calls))
    try:
        batch = batches.global_batch(10**6)
    finally:
        sys.setprofile(None)
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(np.unique(batch)) == len(batch) > 0
    # A walk over the steps, or over the blocks of an epoch, makes a million calls or holds megabytes.
    assert next(calls) < 10_000
    assert memory < 1_000_000


# A run that goes on after an upgrade must find the order that it began with.
def test_the_order_is_the_one_that_checkpoints_were_written_with() -> None:
    assert permute(np.arange(10), 10, 42, 0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]
    assert permute(np.arange(5), 10_000, 42, 0).tolist() == [383, 2144, 597, 1573, 5967]
    assert permute(np.arange(3), HUGE, 42, 1).tolist() == [5134472332, 6394075411, 8961468917]


def chi_squared_chance(seen: npt.NDArray[np.float64], expected: npt.NDArray[np.float64] | float, dof: int) -> float:
    """How likely counts are as far from the expected ones, or as near to them."""
    statistic = float(((seen - expected) ** 2 / expected).sum())
    half_dof, half = torch.tensor([dof / 2, statistic / 2], dtype=torch.float64)
    further = float(torch.special.gammaincc(half_dof, half))
    return 2 * min(further, 1 - further)


def poisson_chance(count: int, mean: float) -> float:
    mean_T = torch.tensor(mean, dtype=torch.float64)
    fewer = float(torch.special.gammaincc(torch.tensor(count + 1.0, dtype=torch.float64), mean_T))
    more = float(torch.special.gammainc(torch.tensor(float(count), dtype=torch.float64), mean_T)) if count else 1.0
    return min(1.0, 2 * min(fewer, more))


def normal_chance(standard_score: float) -> float:
    return math.erfc(abs(standard_score) / math.sqrt(2))


def independence(name: str, rows_EN: Array, columns_EN: Array, num_classes: int = 16) -> dict[str, float]:
    """Chances that classes of two things have nothing to do with each other: in each epoch, and in all together."""
    tables = np.stack(
        [
            np.bincount(rows * num_classes + columns, minlength=num_classes**2).reshape(num_classes, num_classes)
            for rows, columns in zip(rows_EN, columns_EN, strict=True)
        ]
    ).astype(float)
    dof = (num_classes - 1) ** 2

    def expected(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        rows, columns = table.sum(-1, keepdims=True), table.sum(-2, keepdims=True)
        return np.asarray(rows * columns / table.sum((-1, -2), keepdims=True))

    whole = tables.sum(0)
    return {
        f"{name}, by epoch": chi_squared_chance(tables, expected(tables), dof * len(tables)),
        f"{name}, together": chi_squared_chance(whole, expected(whole), dof),
    }


def uniformity(name: str, values_EN: Array, size: int, num_classes: int = 64) -> dict[str, float]:
    """Chances that values of range(size) are spread evenly: in each epoch, and in all together."""
    share = np.diff(-(-np.arange(num_classes + 1) * size // num_classes)) / size
    tables = np.stack([np.bincount(values * num_classes // size, minlength=num_classes) for values in values_EN])
    dof = num_classes - 1
    return {
        f"{name}, by epoch": chi_squared_chance(tables.astype(float), share * values_EN.shape[1], dof * len(tables)),
        f"{name}, together": chi_squared_chance(tables.sum(0).astype(float), share * values_EN.size, dof),
    }


def classes_of(values: Array, size: int) -> dict[str, Array]:
    """16 classes of values of range(size), by their high and by their low bits."""
    return {"high": values * 16 // size, "low": values % 16}


def chances(places_N: Array, blocks_EN: Array, size: int) -> dict[str, float]:
    """How likely each statistic of some places of several epochs is in random orders."""
    found: dict[str, float] = {}
    repeated = np.broadcast_to(places_N, blocks_EN.shape)
    ends = classes_of(blocks_EN, size)
    # Over a range of the places, so that a slice of a huge order has all classes.
    starts = {"high": (repeated - places_N[0]) * 16 // len(places_N), "low": repeated % 16}
    for start, end in itertools.product(starts, ends):
        found |= independence(f"{end} bits of a block by {start} bits of its place", starts[start], ends[end])
    if len(places_N) < size:
        found |= uniformity("block", blocks_EN, size)
    for lag in (1, 2, 8):
        for end in ends:
            name = f"{end} bits of a block by those {lag} places before"
            found |= independence(name, ends[end][:, :-lag], ends[end][:, lag:])
        found |= uniformity(
            f"distance to the block {lag} places before", (blocks_EN[:, lag:] - blocks_EN[:, :-lag]) % size, size
        )
        centred = blocks_EN / size - 0.5
        product = (centred[:, lag:] * centred[:, :-lag]).sum() * 12 / math.sqrt(centred[:, lag:].size)
        found[f"correlation with the block {lag} places before"] = normal_chance(product)
    for lag in (1, 2):
        one, other = blocks_EN[:-lag], blocks_EN[lag:]
        found |= uniformity(f"distance to the block {lag} epochs before", (other - one) % size, size)
        agreements = int((one == other).sum())
        found[f"same block as {lag} epochs before"] = poisson_chance(agreements, one.size / size)
        for end in ends:
            name = f"{end} bits of a block by those {lag} epochs before"
            found |= independence(name, ends[end][:-lag], ends[end][lag:])
    if size & (size - 1) == 0:
        for lag in (1, 2):
            for end, changed in classes_of(blocks_EN[lag:] ^ blocks_EN[:-lag], size).items():
                found |= uniformity(f"{end} bits that differ from {lag} epochs before", changed, 16, 16)
        if len(places_N) == size:
            for mask in (1, 64, size // 2):
                first = places_N[places_N & mask == 0]
                changed_EN = blocks_EN[:, first] ^ blocks_EN[:, first ^ mask]
                for end, changed in classes_of(changed_EN, size).items():
                    found |= uniformity(f"{end} bits that differ between places {mask} apart", changed, 16, 16)
    return found


def chances_of_whole(blocks_EN: Array) -> dict[str, float]:
    """How likely the statistics are that need whole orders."""
    num_epochs, size = blocks_EN.shape
    fixed = (blocks_EN == np.arange(size)).sum(-1)
    followed = int((blocks_EN[:, 1:] == blocks_EN[:, :-1] + 1).sum())
    successors = np.full((num_epochs, size), -1)
    np.put_along_axis(successors, blocks_EN[:, :-1], blocks_EN[:, 1:], axis=1)
    kept = int(((successors[1:] == successors[:-1]) & (successors[1:] >= 0)).sum())
    poisson = np.exp(-1) / np.array([1, 1, 2])
    probabilities = np.append(poisson, 1 - poisson.sum())
    num_cycles = np.array([count_cycles(blocks) for blocks in blocks_EN])
    harmonic = (1 / np.arange(1.0, size + 1)).sum()
    spread = harmonic - (1 / np.arange(1.0, size + 1) ** 2).sum()
    return {
        "blocks at their own place": poisson_chance(int(fixed.sum()), num_epochs),
        "blocks at their own place, how often how many": chi_squared_chance(
            np.bincount(fixed.clip(max=3), minlength=4).astype(float), probabilities * num_epochs, 3
        ),
        "blocks after their predecessor": poisson_chance(followed, num_epochs * (1 - 1 / size)),
        "neighbours kept from the epoch before": poisson_chance(kept, (num_epochs - 1) * (1 - 1 / size)),
        "number of cycles": normal_chance((num_cycles.sum() - num_epochs * harmonic) / math.sqrt(num_epochs * spread)),
        "even and odd": parity_chance(num_cycles, size),
    }


def count_cycles(blocks: Array) -> int:
    after = blocks.tolist()
    seen = bytearray(len(after))
    count = 0
    for start in range(len(after)):
        if not seen[start]:
            count += 1
            at = start
            while not seen[at]:
                seen[at] = 1
                at = after[at]
    return count


def parity_chance(num_cycles: Array, size: int) -> float:
    odd = int(((size - num_cycles) % 2).sum())
    return normal_chance((2 * odd - len(num_cycles)) / math.sqrt(len(num_cycles)))


def orders(shuffle: Permute, size: int, keys: Iterable[tuple[int, int]]) -> Array:
    return np.stack([shuffle(np.arange(size), size, seed, epoch) for seed, epoch in keys])


def all_chances(blocks_EN: Array) -> dict[str, float]:
    size = blocks_EN.shape[1]
    return chances(np.arange(size), blocks_EN, size) | chances_of_whole(blocks_EN)


def unlikely(found: dict[str, float]) -> dict[str, float]:
    return {name: chance for name, chance in found.items() if chance < NEVER}


EPOCHS = 48
KEYS = {
    "epochs of seed 42": [(42, epoch) for epoch in range(EPOCHS)],
    "epochs of seed 0": [(0, epoch) for epoch in range(EPOCHS)],
    "epochs of the largest seed": [(LARGEST_SEED, epoch) for epoch in range(EPOCHS)],
    "consecutive seeds": [(seed, 0) for seed in range(EPOCHS)],
    "seeds and epochs exchanged": [pair for a in range(EPOCHS // 2) for pair in ((a, a + 1), (a + 1, a))],
}


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        *((size, keys) for size in (4096, 5000, 8192) for keys in KEYS),
        *((size, "epochs of seed 42") for size in (4097, 8191, 8193, 65_536)),
    ],
)
def test_nothing_tells_orders_from_random_ones(size: int, keys: str) -> None:
    chosen = KEYS[keys][: EPOCHS if size < 10_000 else 12]
    assert unlikely(all_chances(orders(permute, size, chosen))) == {}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("first", [0, HUGE - 8192])
def test_nothing_tells_a_slice_of_ten_billion_blocks_from_a_random_one(first: int, keys: str) -> None:
    places = np.arange(first, first + 8192)
    blocks_EN = np.stack([permute(places, HUGE, seed, epoch) for seed, epoch in KEYS[keys]])
    assert unlikely(chances(places, blocks_EN, HUGE)) == {}


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("seed", [0, 42, LARGEST_SEED, None])
def test_every_order_of_few_blocks_is_as_likely(size: int, seed: int | None) -> None:
    """`None` draws from consecutive seeds rather than from consecutive epochs."""
    draws = 6000
    keys = ((number, 0) if seed is None else (seed, number) for number in range(draws))
    assert order_chance(orders(permute, size, keys)) > NEVER


def order_chance(blocks_EN: Array) -> float:
    number_of = {blocks: number for number, blocks in enumerate(itertools.permutations(range(blocks_EN.shape[1])))}
    seen = np.bincount([number_of[tuple(blocks)] for blocks in blocks_EN.tolist()], minlength=len(number_of))
    return chi_squared_chance(seen.astype(float), len(blocks_EN) / len(number_of), len(number_of) - 1)


@pytest.mark.parametrize("size", [16, 1000, 4096, 5000, 8192, HUGE])
@pytest.mark.parametrize("seed", [0, 42, LARGEST_SEED])
def test_two_places_get_every_pair_of_blocks(size: int, seed: int) -> None:
    """The first two and the last two: of 16 blocks each pair, of more each pair of eighths."""
    draws = 2000
    places = np.array([0, 1, size - 2, size - 1])
    blocks = np.stack([permute(places, size, seed, epoch) for epoch in range(draws)])
    num_classes = min(size, 16 if size == 16 else 8)
    classes = blocks * num_classes // size
    expected = np.full((num_classes, num_classes), draws / num_classes**2)
    dof = num_classes**2 - 1
    possible = np.ones_like(expected, dtype=bool)
    if num_classes == size:
        possible = ~np.eye(size, dtype=bool)
        expected, dof = np.full((size, size), draws / possible.sum()), int(possible.sum()) - 1
    for pair in (classes[:, :2], classes[:, 2:]):
        seen = np.bincount(pair[:, 0] * num_classes + pair[:, 1], minlength=num_classes**2).reshape(expected.shape)
        assert chi_squared_chance(seen[possible].astype(float), expected[possible], dof) > NEVER


# An even network leaves a trace in what cycle walking makes of it: above a power of two 5 of 8 orders would be even.
@pytest.mark.parametrize("size", [64, 4097, 8191, 8192])
def test_orders_are_even_as_often_as_odd(size: int) -> None:
    num_cycles = [count_cycles(permute(np.arange(size), size, 42, epoch)) for epoch in range(400)]
    assert parity_chance(np.array(num_cycles), size) > NEVER


def with_keys(keys: Callable[[int], list[int]]) -> Permute:
    """The network with chosen keys for an epoch."""
    return lambda indices, size, seed, epoch: order._computed(indices, size, np.array(keys(epoch), dtype=np.uint64))


def word(epoch: int) -> int:
    return int(np.random.SeedSequence(epoch).generate_state(1, np.uint64)[0])


@pytest.mark.parametrize("size", [5000, 8192])
def test_equal_keys_do_not_show(size: int) -> None:
    alike = {"in all rounds": lambda epoch: [word(epoch)] * 8, "in pairs": lambda epoch: [word(epoch), 0] * 4}
    for kind, keys in alike.items():
        blocks_EN = orders(with_keys(keys), size, KEYS["epochs of seed 0"])
        assert unlikely(all_chances(blocks_EN)) == {}, kind


def test_zero_keys_do_not_show() -> None:
    shuffle = with_keys(lambda epoch: [0] * 8)
    size = 65_536
    blocks_EN = np.stack([shuffle(np.arange(size), size, 0, 0), *orders(permute, size, [(0, 0), (0, 1)])])
    assert unlikely(all_chances(blocks_EN)) == {}
    # There is one such network for each power of two.
    sizes = [2**power for power in range(13, 20)]
    num_fixed = sum(int((shuffle(np.arange(size), size, 0, 0) == np.arange(size)).sum()) for size in sizes)
    assert poisson_chance(num_fixed, len(sizes)) > 1e-3


def two_halves_by_xor(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], low_bits: np.uint64, high_bits: np.uint64
) -> npt.NDArray[np.uint64]:
    """The textbook's network."""
    low_mask, high_mask = np.uint64(2 ** int(low_bits) - 1), np.uint64(2 ** int(high_bits) - 1)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (order._hash(high, key) & low_mask)
        else:
            high = high ^ (order._hash(low, key) & high_mask)
    return (high << low_bits) | low


BROKEN: dict[str, tuple[Permute, str]] = {
    "no shuffle": (lambda indices, size, seed, epoch: indices, "blocks after their predecessor"),
    "one order for all epochs": (
        lambda indices, size, seed, epoch: permute(indices, size, seed, 0),
        "same block as 1 epochs before",
    ),
    "one order, rotated": (
        lambda indices, size, seed, epoch: (permute(indices, size, seed, 0) + 17 * epoch) % size,
        "distance to the block 1 epochs before, by epoch",
    ),
    "one order, from another place": (
        lambda indices, size, seed, epoch: permute((indices + 16 * epoch) % size, size, seed, 0),
        "neighbours kept from the epoch before",
    ),
    "one order, bits turned": (
        lambda indices, size, seed, epoch: permute(indices, size, seed, 0) ^ epoch,
        "low bits that differ from 1 epochs before, by epoch",
    ),
    "multiples": (
        lambda indices, size, seed, epoch: (indices * 1237 + epoch * 2311) % size,
        "distance to the block 1 places before, together",
    ),
    "keys that count up": (
        with_keys(lambda epoch: [epoch + 1] * 8),
        "distance to the block 1 epochs before, together",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_order_is_found(kind: str) -> None:
    shuffle, statistic = BROKEN[kind]
    assert statistic in unlikely(all_chances(orders(shuffle, 8192, KEYS["epochs of seed 42"])))


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("size", [5000, 8192])
def test_too_few_rounds_are_found(size: int, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_ROUNDS", rounds)
    assert unlikely(all_chances(orders(permute, size, KEYS["epochs of seed 42"])))


def test_a_hash_that_does_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_hash", lambda values, key: values + key)
    assert len(unlikely(all_chances(orders(permute, 5000, KEYS["epochs of seed 42"])))) > 10


def test_rounds_without_numbers_are_found_with_equal_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_GOLDEN", np.uint64(0))
    found = unlikely(all_chances(orders(with_keys(lambda epoch: [word(epoch)] * 8), 5000, KEYS["epochs of seed 0"])))
    assert {"number of cycles", "blocks at their own place"} <= found.keys()


@pytest.mark.parametrize("size", [8191, 8192])
def test_an_even_network_is_found(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "_encrypt", two_halves_by_xor)
    num_cycles = [count_cycles(permute(np.arange(size), size, 42, epoch)) for epoch in range(100)]
    assert parity_chance(np.array(num_cycles), size) < NEVER


@pytest.mark.slow
def test_a_network_on_few_blocks_is_found() -> None:
    keys = [
        np.random.SeedSequence((5, epoch)).generate_state(8, np.uint64).astype(np.uint64) for epoch in range(16_000)
    ]
    blocks_EN = np.stack([order._computed(np.arange(5), 5, some) for some in keys])
    assert order_chance(blocks_EN) < NEVER
