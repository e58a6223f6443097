"""Two streams of left-context rows: the items, and mask tokens that predict them.

In a masked row, positions attend to mask tokens where evaluation has items. With ``--two_stream``
the rows with left context only keep all their items, and each gets a second row of mask tokens: one
per item and one more::

    row         7  3  9             an item attends to itself and the items before it
    second row  M  M  M  M          M t attends to itself and the items before item t
    steps ago   2  1  0  0
    targets     7  3  9  -

M t attends to the same items as evaluation's mask token after a history that ends before item t;
every item is a target in every epoch. The extra M predicts nothing: with it, where rows are padded
on the left, M t is in the column of the item before item t, the last one to which it attends. After
XLNet (arXiv 1906.08237, section 2.3). Other rows are masked as usual.

The rows of a step are its W windows, left-context rows first, then W second rows in the same order,
empty for windows that have none.
"""

from dataclasses import replace

import numpy as np

from pipeline.batches.times import UNKNOWN
from pipeline.jagged import jagged_positions, splits
from pipeline.training.chunks import JaggedWindows, MaskedWindows
from pipeline.training.cloze import MaskItems, in_steps


class TwoStreams(MaskItems):
    """Mask the rows with both contexts, and add a second row for each left-context row."""

    def apply(self, chunk: JaggedWindows) -> MaskedWindows:
        left, lengths = chunk.left_only, np.diff(chunk.offsets)
        assert left is not None and chunk.keys is not None
        steps_ago = np.repeat(chunk.offsets[1:], lengths) - np.arange(len(chunk.values)) - 1
        both = ~left
        at = jagged_positions(chunk.offsets[:-1][both], chunk.offsets[1:][both])
        values = chunk.values[at]
        masked, masked_items = self.cloze(values, splits(lengths[both]), chunk.keys[both])
        chunk.values[at] = values

        # Row numbers of both streams, step by step.
        step = np.repeat(np.arange(len(chunk.step_windows)), chunk.step_windows)
        window = np.arange(len(left))
        first, second = window + chunk.window_splits[step], window + chunk.window_splits[step + 1]
        all_lengths = np.zeros(2 * len(left), dtype=np.int64)
        all_lengths[first], all_lengths[second] = lengths, np.where(left, lengths + 1, 0)
        offsets = splits(all_lengths)

        items = jagged_positions(offsets[first], offsets[first] + lengths)
        begin = offsets[second[left]]
        queries = jagged_positions(begin, begin + lengths[left])
        predicted = np.repeat(left, lengths)

        values = np.full(offsets[-1], self.cloze.mask_token, dtype=chunk.values.dtype)
        all_steps_ago = np.zeros(offsets[-1], dtype=np.int64)
        all_steps_ago[items], all_steps_ago[queries] = steps_ago, steps_ago[predicted]
        targets = np.zeros(offsets[-1], dtype=masked_items.dtype)  # 0: not a target
        targets[items[at[masked]]], targets[queries] = masked_items, chunk.values[predicted]
        values[items] = chunk.values
        times = None
        if chunk.times is not None:  # M t has those of item t
            times = np.full((offsets[-1], 2), UNKNOWN)
            times[items], times[queries] = chunk.times, chunk.times[predicted]
        predicting, row_splits = np.flatnonzero(targets), 2 * chunk.window_splits
        masked, mask_splits = in_steps(predicting, offsets[row_splits])
        return MaskedWindows(
            **vars(replace(chunk, values=values, offsets=offsets, times=times)),
            row_splits=row_splits,
            masked=masked,
            targets=targets[predicting],
            mask_splits=mask_splits,
            steps_ago=all_steps_ago,
        )
