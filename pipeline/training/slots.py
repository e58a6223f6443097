"""Slots of a step: how many different rows a rank may request of each shard of the item table.

The table is cut into blocks of ``shard_rows`` rows, one per rank. Items 1 1 7 2 8 8 in blocks of 5
request rows 1 2 of the first and 7 8 of the second: 2 slots. All ranks agree on the most slots.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from pipeline.stage import MapStage
from pipeline.training.chunks import MaskedWindows
from pipeline.training.shape_buckets import bucket_size

# The ids are sorted, not marked in a table with more rows than this.
_MARKED_ROWS = 1 << 22
# Up to so many ranks, a comparison of all ids for each block takes less time than `np.bincount` (of
# a few hundred ids some microseconds more).
_COMPARED = 8


@dataclass(eq=False)
class CountSlots(MapStage[MaskedWindows, MaskedWindows]):
    """Give each step its number of slots, the same on all ranks.

    The number never falls during a run and is rounded up, so that few different ones occur.

    Args:
        mask_token: the largest id of a step.
        all_sizes: as in `PadToBuckets`.
    """

    shard_rows: int
    world_size: int
    mask_token: int
    all_sizes: Callable[[np.ndarray], np.ndarray]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._most, self._slots = 1, 0
        self._marks = np.zeros(min(self.mask_token + 1, _MARKED_ROWS), dtype=bool)

    def apply(self, chunk: MaskedWindows) -> MaskedWindows:
        counts = np.array([self._count(parts) for parts in _requested(chunk)])
        largest = self.all_sizes(counts).max(axis=0)
        most = np.maximum.accumulate(np.maximum(largest, self._most))
        units = np.array([bucket_size(one) for one in most.tolist()])
        slots = -(-most // units) * units
        self._most, self._slots = int(most[-1]), int(slots[-1])
        return replace(chunk, slots=slots)

    def _count(self, parts: list[np.ndarray]) -> int:
        """The most different ids of all parts, integers, in one block, or up to 3 % more.

        Different ids take several times as long to count as ids, of which only the mask token
        repeats where the catalog is large.
        """
        repeated = self._in_blocks(parts)
        masked = sum(np.count_nonzero(ids == self.mask_token) for ids in parts)
        repeated[self.mask_token // self.shard_rows] -= masked - bool(masked)
        most = int(repeated.max())
        if most <= self._slots:
            return most
        different = self.different(np.concatenate(parts, dtype=np.int32))
        most = most if most <= 1.03 * different else different
        self._slots = max(self._slots, most)
        return most

    def _in_blocks(self, parts: list[np.ndarray]) -> np.ndarray:
        """How many of the ids of all parts, integers, are in each block: int64 [W]."""
        rows, blocks = self.shard_rows, self.world_size
        if blocks > _COMPARED:
            ids = np.concatenate(parts, dtype=np.int32)
            return np.bincount(ids // np.int32(rows), minlength=blocks)
        bounds = range(rows, blocks * rows, rows)
        below = [sum(np.count_nonzero(ids < bound) for ids in parts) for bound in bounds]
        return np.diff([0, *below, sum(map(len, parts))])

    def different(self, ids: np.ndarray) -> int:
        """The most different ids, int32 [n], in one block."""
        if self.mask_token >= _MARKED_ROWS:
            ids = np.sort(ids)
            ids = ids[np.diff(ids, prepend=-1) > 0]  # np.unique takes four times as long
            return int(self._in_blocks([ids]).max())
        self._marks[ids.astype(np.int64)] = True  # half the time of int32, which NumPy buffers
        blocks = range(0, len(self._marks), self.shard_rows)
        counts = [np.count_nonzero(self._marks[low : low + self.shard_rows]) for low in blocks]
        self._marks[:] = False
        return int(max(counts))


def _requested(chunk: MaskedWindows) -> Iterator[list[np.ndarray]]:
    """The ids of each step: its items, and the targets and negatives of a sampled loss."""
    items, masks = chunk.offsets[chunk.row_splits], chunk.mask_splits
    for step in range(len(items) - 1):
        parts = [chunk.values[items[step] : items[step + 1]]]
        if chunk.negatives is not None:
            parts += [chunk.targets[masks[step] : masks[step + 1]], chunk.negatives[step]]
        yield parts
