"""Draws of items with given probabilities by two look-ups each: Walker's alias method.

A table has a cell for each item. An item whose probability is below that of a cell is *light*: a
*heavy* item fills up its cell. Tables are built by prefix sums (Huebschle-Schneider and Sanders,
arXiv 1903.00227, section 4), in blocks that stay in the processor's cache, without further arrays
of the table's size.
"""

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np

_BLOCK = 1 << 14  # items
# Some items, and sums over all items of their kind up to each of them.
_Block = tuple[np.ndarray, np.ndarray]


class AliasTable:
    """Draws of 0 ... V - 1.

    All cells are equally likely; cell i yields i if a uniform uint32 is below ``keep[i]``, else
    ``other[i]``.

    Args:
        size: V, below 2^31.
        probabilities: those of a slice of 0 ... V - 1, float64.
    """

    def __init__(self, size: int, probabilities: Callable[[slice], np.ndarray]) -> None:
        self._size, self._probabilities = size, probabilities
        # Side by side: a draw waits for one read of memory.
        self._cells = np.empty(size, dtype=[("keep", np.uint32), ("other", np.int32)])
        self.keep, self.other = self._cells["keep"], self._cells["other"]
        lights = self._lights()
        light, missing = next(lights)
        last = np.empty(0, dtype=np.int64)
        # Heavy items, in order, fill up the light cells, in order, from their surplus.
        for heavy, surplus in self._heavies():
            # A heavy item may give more than its surplus; the next heavy item fills its cell up.
            self.other[last] = heavy[:1]
            self.other[heavy[:-1]] = heavy[1:].astype(np.int32)
            last = heavy[-1:]
            while len(heavy):
                # The surplus of the first ones ends within these light cells.
                ending = np.searchsorted(surplus, missing[-1], side="right")
                filled = np.searchsorted(missing[: len(light)], surplus[:ending])
                left = 1 + surplus[:ending] - missing[filled]
                self.keep[heavy[:ending]] = _thresholds(np.clip(left, 0, 1))
                givers = np.repeat(heavy[:ending].astype(np.int32), np.diff(filled, prepend=0))
                self.other[light[: len(givers)]] = givers
                light, missing = light[len(givers) :], missing[len(givers) :]
                heavy, surplus = heavy[ending:], surplus[ending:]
                if len(heavy):
                    self.other[light] = heavy[0]
                    light, missing = next(lights)
        # What rounding left.
        self.other[last] = last
        for left_over, _ in chain([(light, missing)], lights):
            self.other[left_over] = last if len(last) else left_over

    def __call__(self, cells: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Draws, int64 [N], from uniform cells, int64 [N], and uniform uint32 [N]."""
        found = np.take(self._cells, cells, mode="clip")  # all are in range
        return np.where(draws < found["keep"], cells, found["other"])

    def _heavies(self) -> Iterator[_Block]:
        """Blocks of heavy items, with the sums of what exceeds their cells."""
        total = 0.0
        for items, share in self._blocks(np.greater_equal):
            surplus = share - 1
            surplus[0] += total
            yield items, np.cumsum(surplus, out=surplus)
            total = surplus[-1]

    def _lights(self) -> Iterator[_Block]:
        """Blocks of light items, with the sums of what their cells miss before and after each.

        Sets ``keep`` of their cells. The last block is empty; no surplus exceeds its sum.
        """
        total = 0.0
        for items, share in self._blocks(np.less):
            self.keep[items] = _thresholds(share)
            missing = np.empty(len(items) + 1)
            missing[0] = total
            np.subtract(1, share, out=missing[1:])
            yield items, np.cumsum(missing, out=missing)
            total = missing[-1]
        yield np.empty(0, dtype=np.int64), np.array([total, np.inf])

    def _blocks(self, chosen: Callable[[np.ndarray, int], np.ndarray]) -> Iterator[_Block]:
        """Items whose probability, in cells, compares to 1 as given; and these, float64."""
        for low in range(0, self._size, _BLOCK):
            share = self._probabilities(slice(low, min(low + _BLOCK, self._size))) * self._size
            items = np.flatnonzero(chosen(share, 1))
            if len(items):
                yield items + low, share[items]


def _thresholds(share: np.ndarray) -> np.ndarray:
    """uint32 below which a part 0 ... 1 of uniform uint32 are."""
    return np.minimum(share * 2.0**32, 2**32 - 1).astype(np.uint32)
