"""Random draws as a function of a key: the same on any rank, in any batch.

A counter-based hash replaces a generator with state::

    key = key64(seed, epoch)                       one Python int
    row_keys = child_keys(key, windows)            uint64 [B], one per window
    draws = low32(row_keys)                        uint32 [B], uniform
    chosen = below(draws, 0.15)                    bool [B], true for 15 % of them
    items = 1 + scaled(draws, num_items)           int64 [B], uniform in 1..num_items

The 64-bit mixer is splitmix64 (Steele, Lea, Flood 2014), the 32-bit one lowbias32 (Wellons,
hash-prospector). Neither is cryptographic.
"""

from functools import lru_cache

import numpy as np

_GOLDEN64 = 0x9E3779B97F4A7C15
_GOLDEN32 = np.uint32(0x9E3779B9)
_MASK64 = (1 << 64) - 1
# Arrays of no dimension: NumPy converts a scalar in each call.
_ROUNDS32 = [
    (np.array(shift, dtype=np.uint32), np.array(factor, dtype=np.uint32))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B))
]
_LAST_SHIFT32 = np.array(16, dtype=np.uint32)
_TURNS = 6  # of a Feistel network; even, so that both halves end with as many bits as before
# Values mixed at a time, so that all passes over them stay in the processor's cache.
_BLOCK = 1 << 15


def key64(*parts: int) -> int:
    """One 64-bit key of integers of any size and sign; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix64(key + np.uint64((_GOLDEN64 + part) & _MASK64))
    return int(key[0])


def child_keys(key: int | np.ndarray, parts: np.ndarray) -> np.ndarray:
    """uint64 [N]: a key per part, of a parent key (one, or uint64 [N]) and integers [N]."""
    parent = np.uint64(key) if isinstance(key, int) else key
    return _mix64(parts.astype(np.uint64) * np.uint64(_GOLDEN64) + parent)


def low32(keys: np.ndarray) -> np.ndarray:
    """The low halves of uint64 keys, independent of the high halves."""
    return keys.astype(np.uint32)


def high32(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(32)).astype(np.uint32)


def position_draws(row_keys: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Uniform uint32 [T], one per position of B jagged rows, keyed by (row key, position in row).

    Row b, with the key row_keys[b] (uint32 [B]), has the positions offsets[b]:offsets[b + 1].
    """
    bases = row_keys - offsets[:-1].astype(np.uint32) * _GOLDEN32
    draws = np.repeat(bases, np.diff(offsets))
    draws += _golden_ramp(len(draws).bit_length())[: len(draws)]
    return mix32(draws)


def permuted(places: np.ndarray, size: int, key: int) -> np.ndarray:
    """int64 [N]: where a permutation of 0..size-1 takes these places (int64 [N]).

    A Feistel network on the bits of size - 1, applied again where its result is not below the size:
    nothing of the permutation is held in memory.
    """
    bits = max((size - 1).bit_length(), 2)
    values, outside = places.astype(np.uint64), np.arange(len(places))
    while len(outside):
        left_bits, right_bits = bits - bits // 2, bits // 2
        left, right = values[outside] >> np.uint64(right_bits), values[outside]
        right = right & np.uint64((1 << right_bits) - 1)
        for turn in range(_TURNS):
            mixed = child_keys(key64(key, turn), right) & np.uint64((1 << left_bits) - 1)
            left, right = right, left ^ mixed
            left_bits, right_bits = right_bits, left_bits
        values[outside] = (left << np.uint64(right_bits)) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def unit_floats(keys: np.ndarray) -> np.ndarray:
    """uint64 keys as float64 in [0, 1), of 53 random bits."""
    return (keys >> np.uint64(11)) * 2.0**-53


def mix32(values: np.ndarray) -> np.ndarray:
    """Mix uint32 values **in place** and return them: a bijection that looks random."""
    shifted = np.empty(min(len(values), _BLOCK), dtype=np.uint32)
    for first in range(0, len(values), _BLOCK):
        block = values[first : first + _BLOCK]
        scratch = shifted[: len(block)]
        for shift, factor in _ROUNDS32:
            np.right_shift(block, shift, out=scratch)
            np.bitwise_xor(block, scratch, out=block)
            np.multiply(block, factor, out=block)
        np.right_shift(block, _LAST_SHIFT32, out=scratch)
        np.bitwise_xor(block, scratch, out=block)
    return values


def below(draws: np.ndarray, probability: float) -> np.ndarray:
    """Bool [N]: true with this probability, of uniform uint32 draws [N]; always true for 1."""
    return draws < round(probability * 2**32)


def scaled(draws: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Int64 [N], uniform in 0..bound-1, of uniform uint32 draws [N]; bound < 2**31, one or [N]."""
    product = draws.astype(np.uint64) * np.asarray(bound, dtype=np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)


@lru_cache(maxsize=2)
def _golden_ramp(size_bits: int) -> np.ndarray:
    return np.arange(1 << size_bits, dtype=np.uint32) * _GOLDEN32


def _mix64(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
