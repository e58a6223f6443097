"""Two streams of rows with left context alone: the items, and mask tokens that ask for them.

A masked item leaves a hole in what later positions see, but at evaluation a history has none. With
``--two_stream`` rows with left context alone keep all their items, and each gets a second row of
mask tokens, one for every item and one more::

    row         7  3  9             an item sees itself and items before it
    its second  M  M  M  M          M t sees itself and items before item t
    steps ago   2  1  0  0
    targets     7  3  9  -

so that M t sees what the mask token behind a history that ends before item t sees at evaluation,
and every item is a target of every epoch. The one more, which predicts nothing, makes queries one
more than keys: "causal" then means "strictly before" to attention kernels, which align the ends.
After XLNet (arXiv 1906.08237, section 2.3). Rows that see both ways are masked as ever.

The rows of a step are its windows, those with left context alone first, then as many second rows in
the same order, empty for windows that have none.
"""

import numpy as np

from pipeline.training.cloze import MaskItems
from pipeline.training.sampler import Chunk
from pipeline.training.windows import jagged_positions


class TwoStreams(MaskItems):
    """Mask the rows that see both ways, give the others a second one; sets steps_ago too."""

    def apply(self, chunk: Chunk) -> Chunk:
        left, lengths = chunk.left_only, np.diff(chunk.offsets)
        ends = np.repeat(chunk.offsets[1:], lengths)
        steps_ago = ends - np.arange(len(ends)) - 1
        masked, targets = self._mask(chunk, ~left, lengths)

        # Where rows stand among those of both streams, step by step.
        step = np.repeat(np.arange(len(chunk.step_windows)), chunk.step_windows)
        row = np.arange(len(left))
        first, second = row + chunk.row_splits[step], row + chunk.row_splits[step + 1]
        both = np.zeros(2 * len(left), dtype=np.int64)
        both[first], both[second] = lengths, np.where(left, lengths + 1, 0)
        offsets = np.concatenate([[0], np.cumsum(both)])

        items = jagged_positions(offsets[first], offsets[first] + lengths)
        begin = offsets[second[left]]
        asked = jagged_positions(begin, begin + lengths[left])
        asked_for = np.repeat(left, lengths)

        values = np.full(offsets[-1], self.cloze.mask_token, dtype=chunk.values.dtype)
        chunk.steps_ago = np.zeros(offsets[-1], dtype=np.int64)
        chunk.steps_ago[items], chunk.steps_ago[asked] = steps_ago, steps_ago[asked_for]
        target = np.zeros(offsets[-1], dtype=targets.dtype)  # items count from 1
        target[items[masked]], target[asked] = targets, chunk.values[asked_for]
        values[items] = chunk.values

        chunk.masked = np.flatnonzero(target)
        chunk.targets = target[chunk.masked]
        chunk.values, chunk.offsets, chunk.row_splits = values, offsets, 2 * chunk.row_splits
        return chunk

    def _mask(
        self, chunk: Chunk, chosen: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask the chosen rows in place: masked positions, and the items that stood there."""
        at = jagged_positions(chunk.offsets[:-1][chosen], chunk.offsets[1:][chosen])
        values = chunk.values[at]
        masked, targets = self.cloze(
            values,
            np.concatenate([[0], np.cumsum(lengths[chosen])]),
            chunk.epoch,
            chunk.windows[chosen],
            chunk.copies[chosen],
        )
        chunk.values[at] = values
        return at[masked], targets
