"""Few batch shapes: positions and masked positions rounded up, where the device gains by it.

Matrix libraries choose a kernel anew, allocators a block, and CUDA graphs must be captured, for
every new shape; histories have different lengths, so without this every step has a new one. Each
step gets filler rows of mask tokens with nothing to predict, as many as may ever be needed (those
not needed are empty), and masked positions with target 0, the padding item, which counts for
nothing. Three rows, ``max_len`` 4, rounded up to a multiple of 8 positions and 4 masked ones::

    values    7 11  9 | 4 11 | 5 6 11 2         7 11 9 | 4 11 | 5 6 11 2 | 11 11 11 11 | 11 11 11
    masked       1        4        7      ->    1 4 7 0
    targets      3        2        8            3 2 8 0

Ranks that agree on their steps' sizes get batches of the same shapes, those of the largest.
"""

import math
from collections.abc import Callable

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.training.sampler import Chunk, ChunkStage
from pipeline.training.windows import jagged_positions


def bucket_size(usual: float) -> int:
    """A sixteenth of the next power of two, at least 8: few shapes, little waste.

    Args:
        usual: positions of a step, on average.
    """
    return max(8, (1 << (math.ceil(usual) - 1).bit_length()) // 16)


class PadToBuckets(ChunkStage[Chunk]):
    """Fill each step of the chunk up to the next multiple of the units.

    Args:
        source: masked chunks.
        max_len: items of a filler row, at most.
        mask_token: what filler rows are made of.
        position_unit, mask_unit: positions and masked positions of a step become multiples.
        agree: gives the largest of each number on all ranks, which all ask alike; None: this rank's
            sizes are nobody else's concern. Sets the chunk's ``alike``.
    """

    def __init__(
        self,
        source: BaseNode[Chunk],
        max_len: int,
        mask_token: int,
        position_unit: int,
        mask_unit: int,
        agree: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        super().__init__(source)
        self.max_len, self.mask_token = max_len, mask_token
        self.position_unit, self.mask_unit = position_unit, mask_unit
        self.agree = agree

    def apply(self, chunk: Chunk) -> Chunk:
        rows = np.diff(chunk.row_splits)
        value_splits = chunk.offsets[chunk.row_splits]
        mask_splits = np.searchsorted(chunk.masked, value_splits)
        positions, masks = np.diff(value_splits), np.diff(mask_splits)
        new_positions, new_masks, new_rows = self._sizes(chunk, positions, masks, rows)

        new_value_splits, new_row_splits = _splits(new_positions), _splits(new_rows)
        fillers = new_rows - rows
        firsts = np.repeat(_splits(fillers)[:-1], fillers)
        before = self.max_len * (np.arange(fillers.sum()) - firsts)
        missing = np.repeat(new_positions - positions, fillers)
        lengths = np.empty(new_row_splits[-1], dtype=np.int64)
        lengths[_heads(new_row_splits, rows)] = np.diff(chunk.offsets)
        filler_rows = jagged_positions(new_row_splits[1:] - fillers, new_row_splits[1:])
        lengths[filler_rows] = np.clip(missing - before, 0, self.max_len)
        values = np.full(new_value_splits[-1], self.mask_token, dtype=chunk.values.dtype)
        values[_heads(new_value_splits, positions)] = chunk.values

        if chunk.steps_ago is not None:
            steps_ago = np.zeros(new_value_splits[-1], dtype=chunk.steps_ago.dtype)
            steps_ago[_heads(new_value_splits, positions)] = chunk.steps_ago
            chunk.steps_ago = steps_ago

        new_mask_splits = _splits(new_masks)
        masked = np.repeat(new_value_splits[:-1], new_masks)  # a step's first position, target 0
        targets = np.zeros(new_mask_splits[-1], dtype=chunk.targets.dtype)
        heads = _heads(new_mask_splits, masks)
        masked[heads] = chunk.masked + np.repeat(new_value_splits[:-1] - value_splits[:-1], masks)
        targets[heads] = chunk.targets

        chunk.values, chunk.offsets, chunk.row_splits = values, _splits(lengths), new_row_splits
        chunk.masked, chunk.targets, chunk.mask_splits = masked, targets, new_mask_splits
        return chunk

    def _sizes(
        self, chunk: Chunk, positions: np.ndarray, masks: np.ndarray, rows: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, masked positions and rows of each step, int64 [S] each, after filling up."""
        positions = _rounded(np.maximum(positions, 1), self.position_unit)
        masks, fewest = _rounded(masks, self.mask_unit), positions
        if self.agree is not None:
            windows = chunk.step_windows
            agreed = self.agree(np.stack([positions, masks, rows, windows, -positions, -windows]))
            positions, masks, rows = agreed[:3]
            fewest = -agreed[4]
            chunk.alike = agreed[3] == -agreed[5]
        # As many filler rows as may be needed, whatever the positions before rounding.
        most_missing = positions - fewest + self.position_unit - 1
        return positions, masks, rows - (-most_missing // self.max_len)


def _rounded(counts: np.ndarray, unit: int) -> np.ndarray:
    return -(-counts // unit) * unit


def _splits(counts: np.ndarray) -> np.ndarray:
    """int64 [S + 1]: where each of S parts begins."""
    return np.concatenate([[0], np.cumsum(counts)])


def _heads(splits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions of the first ``counts[s]`` entries of every part s."""
    return jagged_positions(splits[:-1], splits[:-1] + counts)
