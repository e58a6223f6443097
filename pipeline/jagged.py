"""Arithmetic on jagged rows: B rows of different lengths, one after the other in a flat array."""

from functools import lru_cache

import numpy as np


def splits(lengths: np.ndarray) -> np.ndarray:
    """Where each row begins, and where the last one ends: int64 [B + 1] of int64 [B]."""
    return np.concatenate([[0], np.cumsum(lengths)])


def jagged_positions(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The positions of B ranges start[b]:end[b] (int64 [B]), one after the other: int64 [T]."""
    lengths = end - start
    positions = np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    positions += _ramp(len(positions).bit_length())[: len(positions)]
    return positions


def row_item_keys(
    items: np.ndarray, begin: np.ndarray, end: np.ndarray, id_bound: int
) -> np.ndarray:
    """``b * id_bound + item`` for the items of B ranges: int64, ascending, distinct."""
    rows = np.repeat(np.arange(len(begin)), end - begin)
    keys = np.sort(rows * id_bound + items[jagged_positions(begin, end)])
    return keys[np.diff(keys, prepend=-1) > 0]


@lru_cache(maxsize=2)
def _ramp(size_bits: int) -> np.ndarray:
    """int64 0 .. 2**size_bits - 1. Cached: making it costs as much as adding it."""
    return np.arange(1 << size_bits)
