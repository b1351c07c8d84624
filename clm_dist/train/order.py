"""The order of the blocks, as arithmetic: a keyed permutation that is computed, not stored."""

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_U64 = np.uint64


def permute(indices: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a random permutation of range(size), keyed by seed and epoch, puts each index.

    O(1) memory and O(len(indices)) time, so any place in any epoch is reached at once. An alternating Feistel network
    over the smallest power of two that holds `size` (Luby and Rackoff 1988), with values outside the range encrypted
    again until they fall inside (cycle walking; Black and Rogaway 2002). At most half of the values walk.
    """
    bits = max(2, int(size - 1).bit_length())
    low_bits = _U64(bits // 2)
    high_bits = _U64(bits - bits // 2)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64).astype(_U64)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _encrypt(values[outside], keys, low_bits, high_bits)
        outside = values >= size
    return values.astype(np.int64)


def _encrypt(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], low_bits: np.uint64, high_bits: np.uint64
) -> npt.NDArray[np.uint64]:
    """A permutation of range(2 ** (low_bits + high_bits)): each half is changed in turn by a hash of the other."""
    one = _U64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2:
            low = low ^ (_hash(high, key) & low_mask)
        else:
            high = high ^ (_hash(low, key) & high_mask)
    return (high << low_bits) | low


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood 2014) of value + key; arithmetic wraps on purpose."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> _U64(27))) * _U64(0x94D049BB133111EB)
    return mixed ^ (mixed >> _U64(31))
