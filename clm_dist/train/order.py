"""The order of the blocks, as arithmetic: a keyed permutation that is computed, not stored.

Up to 4,096 blocks the whole order is drawn and sorted, which makes every permutation equally likely. Above that it is a
Feistel network: each half of an index is changed in turn by a hash of the other, which can be undone whatever the hash
is, so no two indices meet. Two choices are there for what tests found without them:

- A network on few values is far from uniform: 8 rounds on 8 values gave some orders of 5 blocks 1.6 times their share
  (chi-squared 310 at 119 degrees of freedom). Hence the drawn order of few.
- Halves are changed by addition. XOR, the textbook's, gives only even permutations once a half has two bits: every
  order of 8,192 blocks was even, and every order of 8,191 odd.

Keys: SeedSequence hashes seed and epoch into a word of 64 bits for each round, so seeds 0, 1 and 2**32 - 1 are as good
as any, and so are neighbours; both stay below 2**32, so no two pairs are hashed alike. No key is known to be weak: each
round adds its number, because keys that are equal in all rounds would make the network the fourth power of its first
two rounds, which has three times as many blocks at their own place. Only keys of several epochs must not be related
(keys that count up are, and it shows), and that is what the hash is for. This is a shuffle, not a cipher: nobody is
kept from guessing an order.
"""

import numpy as np
import numpy.typing as npt

# The most blocks whose order is drawn: sorting them takes 0.1 ms, no longer than the network.
_MOST_DRAWN = 4096
_ROUNDS = 8
_U64 = np.uint64
# splitmix64's step, 2**64 divided by the golden ratio.
_GOLDEN = _U64(0x9E3779B97F4A7C15)


def permute(indices: npt.NDArray[np.int64], size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Where a random permutation of range(size), keyed by seed and epoch, puts each index.

    O(1) memory and O(len(indices)) time, so any place in any epoch is reached at once.
    """
    key = np.random.SeedSequence((seed, epoch))
    if size <= _MOST_DRAWN:
        return _drawn(size, key)[indices]
    return _computed(indices, size, key.generate_state(_ROUNDS, np.uint64).astype(_U64))


def _computed(indices: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where the network with one key a round puts each index.

    An alternating Feistel network over the smallest power of two that holds `size` (Luby and Rackoff 1988), with values
    outside the range encrypted again until they fall inside (cycle walking; Black and Rogaway 2002). At most half of
    the values walk.
    """
    bits = int(size - 1).bit_length()
    low_bits = _U64(bits // 2)
    high_bits = _U64(bits - bits // 2)
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    while outside.any():
        values[outside] = _encrypt(values[outside], keys, low_bits, high_bits)
        outside = values >= size
    return values.astype(np.int64)


def _drawn(size: int, key: np.random.SeedSequence) -> npt.NDArray[np.int64]:
    """A permutation of range(size), each as likely as any other but for equal draws (5e-13 at 4,096).

    Not Generator.permutation: numpy promises the same numbers in every release for its bit generators alone, and a run
    that is resumed after an upgrade must go on in the same order.
    """
    draws = np.random.PCG64(key).random_raw(size)
    return np.argsort(draws, kind="stable").astype(np.int64)


def _encrypt(
    values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], low_bits: np.uint64, high_bits: np.uint64
) -> npt.NDArray[np.uint64]:
    """A permutation of range(2 ** (low_bits + high_bits)): a hash of each half is added to the other in turn."""
    one = _U64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << high_bits) - one
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys + np.arange(len(keys), dtype=np.uint64) * _GOLDEN):
        if number % 2:
            low = (low + _hash(high, key)) & low_mask
        else:
            high = (high + _hash(low, key)) & high_mask
    return (high << low_bits) | low


def _hash(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea and Flood 2014) of value + key; arithmetic wraps on purpose."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> _U64(27))) * _U64(0x94D049BB133111EB)
    return mixed ^ (mixed >> _U64(31))
