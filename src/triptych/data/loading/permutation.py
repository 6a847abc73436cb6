"""Random permutations of 0 to n - 1 that are computed instead of stored."""

import numpy as np

ROUNDS = 6


def permute(places: np.ndarray, count: int, *key: int) -> np.ndarray:
    """Return the elements of a random permutation of 0 to `count` - 1 at some positions.

    A Feistel network (Luby and Rackoff 1988) permutes the integers of an even number of bits. Results that are not
    below `count` are permuted again until they are (cycle walking, Black and Rogaway 2002, Section 4). The domain is at
    most four times as large as `count`, so this takes at most four passes on average.

    Args:
        places: integers, positions from 0 to `count` - 1.
        count: length of the permutation.
        key: integers that seed the permutation.

    Returns:
        int64, as many as `places`.
    """
    half = max(1, -(-max(count - 1, 1).bit_length() // 2))
    low = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(ROUNDS, np.uint64)
    result = np.array(places, np.uint64)
    beyond = np.ones(len(result), bool)
    while beyond.any():
        result[beyond] = _encrypt(result[beyond], np.uint64(half), low, keys)
        beyond = result >= count
    return result.astype(np.int64)


def hashed_integers(numbers: np.ndarray, below: int, key: int) -> np.ndarray:
    """Return int64: a pseudorandom integer from 0 to `below` - 1 for each of `numbers`, determined by the number and
    `key`."""
    shape = np.shape(numbers)
    mixed = _mix(_mix(np.array(numbers, np.uint64, ndmin=1)) ^ np.uint64(key % 2**64))
    return (mixed % np.uint64(below)).astype(np.int64).reshape(shape)


def _encrypt(x: np.ndarray, half: np.uint64, low: np.uint64, keys: np.ndarray) -> np.ndarray:
    left, right = x >> half, x & low
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & low)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood 2014). Products overflow, as intended."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
