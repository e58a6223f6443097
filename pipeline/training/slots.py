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


@dataclass(eq=False)
class CountSlots(MapStage[MaskedWindows, MaskedWindows]):
    """Give each step its number of slots, the same on all ranks.

    The number never falls during a run and is rounded up, so that few different ones occur.

    Args:
        largest_sizes: as in `PadToBuckets`.
    """

    shard_rows: int
    world_size: int
    largest_sizes: Callable[[np.ndarray], np.ndarray]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._most = 1

    def apply(self, chunk: MaskedWindows) -> MaskedWindows:
        counts = np.array([self._count(ids) for ids in _requested(chunk)])
        most = np.maximum.accumulate(np.maximum(self.largest_sizes(counts), self._most))
        self._most = int(most[-1])
        units = np.array([bucket_size(one) for one in most.tolist()])
        return replace(chunk, slots=-(-most // units) * units)

    def _count(self, ids: np.ndarray) -> int:
        """The most different ids, int32 [n], in one block."""
        ids = np.sort(ids)
        first = np.flatnonzero(ids[1:] != ids[:-1]) + 1  # where another id begins
        blocks = np.searchsorted(ids, np.arange(self.world_size + 1) * self.shard_rows)
        # Each block that is not empty begins with one more different id.
        inside = np.searchsorted(first, blocks[1:]) - np.searchsorted(first, blocks[:-1], "right")
        return int((inside + (blocks[1:] > blocks[:-1])).max())


def _requested(chunk: MaskedWindows) -> Iterator[np.ndarray]:
    """The ids of each step: its items, and the targets and negatives of a sampled loss."""
    items, masks = chunk.offsets[chunk.row_splits], chunk.mask_splits
    for step in range(len(items) - 1):
        ids = chunk.values[items[step] : items[step + 1]]
        if chunk.negatives is not None:
            targets = chunk.targets[masks[step] : masks[step + 1]]
            ids = np.concatenate([ids, targets, chunk.negatives[step].astype(np.int32)])
        yield ids
