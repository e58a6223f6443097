"""Few batch shapes: positions and masked positions of each step padded to bucket sizes.

For every new shape, matrix libraries choose a kernel, allocators a block, and CUDA graphs must be
captured. Each step gets filler rows of mask tokens without targets, always the same number for the
same shape (surplus ones are empty), and masked positions with target 0, which the loss ignores.
Three rows, ``max_len`` 4, padded to a multiple of 8 positions and 4 masked ones::

    values    7 11  9 | 4 11 | 5 6 11 2         7 11 9 | 4 11 | 5 6 11 2 | 11 11 11 11 | 11 11 11
    masked       1        4        7      ->    1 4 7 0
    targets      3        2        8            3 2 8 0
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import numpy as np

from pipeline.batches.times import UNKNOWN
from pipeline.jagged import splits
from pipeline.stage import MapStage
from pipeline.training.chunks import MaskedWindows


def bucket_size(mean_positions: float) -> int:
    """A sixteenth of the next power of two, at least 8: few shapes, little padding."""
    return max(8, (1 << (math.ceil(mean_positions) - 1).bit_length()) // 16)


@dataclass(eq=False)
class PadToBuckets(MapStage[MaskedWindows, MaskedWindows]):
    """Pad each step to multiples of the bucket sizes, by filler rows of at most ``max_len`` items.

    Args:
        position_unit, mask_unit: bucket sizes of positions and of masked positions.
        all_sizes: integers of all ranks, [W, ...], from this rank's, called by every rank for every
            chunk: steps get the shapes of the largest rank. None: shapes may differ.
    """

    max_len: int
    mask_token: int
    position_unit: int
    mask_unit: int
    all_sizes: Callable[[np.ndarray], np.ndarray] | None = None

    def apply(self, chunk: MaskedWindows) -> MaskedWindows:
        value_splits = chunk.offsets[chunk.row_splits]
        rows, masks = np.diff(chunk.row_splits), np.diff(chunk.mask_splits)
        positions = np.diff(value_splits)
        new_positions = _rounded_up(np.maximum(positions, 1), self.position_unit)
        new_masks = _rounded_up(masks, self.mask_unit)
        new_rows, fewest, all_windows, all_targets = rows, new_positions, 0, None
        if self.all_sizes is not None:
            sizes = [new_positions, new_masks, rows, chunk.step_windows, masks]
            of_ranks = self.all_sizes(np.stack(sizes)).swapaxes(0, 1)  # [5, W, S]
            new_positions, new_masks, new_rows, *_ = of_ranks.max(axis=1)
            fewest = of_ranks[0].min(axis=0)
            all_windows, all_targets = of_ranks[3:].sum(axis=1)
        # Enough filler rows for any number of positions in the bucket, on any rank.
        most_missing = new_positions - fewest + self.position_unit - 1
        new_rows = new_rows - (-most_missing // self.max_len)

        # The first filler rows of a step take ``max_len`` of the missing positions each.
        fillers, missing = new_rows - rows, new_positions - positions
        filler = np.arange(fillers.sum()) - np.repeat(splits(fillers)[:-1], fillers)
        of_fillers = np.clip(np.repeat(missing, fillers) - self.max_len * filler, 0, self.max_len)
        lengths = _alternating(np.diff(chunk.offsets), rows, of_fillers, fillers)

        steps_ago, times, more = chunk.steps_ago, chunk.times, new_masks - masks
        return replace(
            chunk,
            values=_padded(chunk.values, positions, missing, self.mask_token),
            offsets=splits(lengths),
            row_splits=splits(new_rows),
            masked=_padded(chunk.masked, masks, more, 0),  # surplus ones: a step's first position
            targets=_padded(chunk.targets, masks, more, 0),
            mask_splits=splits(new_masks),
            steps_ago=None if steps_ago is None else _padded(steps_ago, positions, missing, 0),
            times=None if times is None else _padded(times, positions, missing, UNKNOWN),
            all_windows=all_windows,
            all_targets=all_targets,
        )


def _rounded_up(counts: np.ndarray, unit: int) -> np.ndarray:
    return -(-counts // unit) * unit


def _padded(entries: np.ndarray, counts: np.ndarray, more: np.ndarray, fill: int) -> np.ndarray:
    """Parts of ``counts[s]`` entries, and ``more[s]`` times ``fill`` after each."""
    fills = np.full((more.sum(), *entries.shape[1:]), fill, dtype=entries.dtype)
    return _alternating(entries, counts, fills, more)


def _alternating(
    entries: np.ndarray, counts: np.ndarray, others: np.ndarray, more: np.ndarray
) -> np.ndarray:
    """Parts of ``counts[s]`` entries, and ``more[s]`` of the others after each."""
    # Copying whole parts takes a third of the time of scattering entries to computed places.
    both = [
        [parts[first:after] for first, after in pairwise(splits(sizes).tolist())]
        for parts, sizes in ((entries, counts), (others, more))
    ]
    return np.concatenate([*chain.from_iterable(zip(*both, strict=True))])
