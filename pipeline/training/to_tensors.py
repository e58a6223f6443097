"""From the arrays of several steps to the steps' batches.

MaskedWindows    values [..step 0..|..step 1..|..step 2..]      one NumPy array each
  ToTensors      one tensor for the chunk (``pipeline/batches/packing.py``), of which each step gets
PackedBatch      a slice
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.batches.packing import float_pairs, pack
from pipeline.batches.times import UNKNOWN
from pipeline.batches.train_batch import PackedBatch, rounded_up
from pipeline.stage import MapStage
from pipeline.training.chunks import MaskedWindows

# Batches, each with the loader's state after it.
Steps = list[tuple[PackedBatch, dict[str, int]]]


@dataclass(eq=False)
class ToTensors(MapStage[MaskedWindows, Steps]):
    """The batches of a chunk, in one allocation."""

    mask_token: int
    candidate_range: tuple[int, int] | None
    pin_memory: bool

    def apply(self, chunk: MaskedWindows) -> Steps:
        if chunk.row_splits[-1] == 0:
            chunk = self._filled(chunk)
        lengths, rows = np.diff(chunk.offsets), np.diff(chunk.row_splits)
        longest = np.maximum.reduceat(lengths, chunk.row_splits[:-1])
        each = chunk.step_windows, rows, longest, chunk.all_windows, chunk.slots
        shapes = [np.broadcast_to(one, len(rows)).tolist() for one in each]
        steps = pack(_parts(chunk, lengths), self.pin_memory)
        batches = [
            PackedBatch(packed, windows, rows, rounded_up(most), self.candidate_range, total, slots)
            for packed, windows, rows, most, total, slots in zip(steps, *shapes, strict=True)
        ]
        states = [{"epoch": chunk.epoch, "sample": sample} for sample in chunk.step_samples]
        return [*zip(batches, states, strict=True)]

    def _filled(self, chunk: MaskedWindows) -> MaskedWindows:
        """An epoch's last step, empty on this rank, plus one mask token without a target."""
        return replace(
            chunk,
            values=np.array([self.mask_token], dtype=chunk.values.dtype),
            offsets=np.array([0, 1]),
            row_splits=np.array([0, 1]),
            steps_ago=None if chunk.steps_ago is None else np.zeros(1, dtype=np.int64),
            times=None if chunk.times is None else np.full((1, 2), UNKNOWN),
        )


def _parts(chunk: MaskedWindows, lengths: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The parts of all steps, in the order of :class:`PackedBatch`, and where each step begins."""
    rows, items, masks = chunk.row_splits, chunk.offsets[chunk.row_splits], chunk.mask_splits
    steps = np.arange(len(rows))
    ends = np.diff(rows) + 1  # a step's offsets: one more than rows
    offsets = chunk.offsets[np.arange(rows[-1] + steps[-1]) - np.repeat(steps[:-1], ends)]
    offsets -= np.repeat(items[:-1], ends)
    parts = {"values": (chunk.values, items), "targets": (chunk.targets, masks)}
    if chunk.negatives is not None:
        parts["negatives"] = _even(chunk.negatives)
    parts["lengths"], parts["offsets"] = (lengths, rows), (offsets, rows + steps)
    parts["masked"] = (chunk.masked, masks)
    if chunk.all_targets is not None:
        parts["all_targets"] = (chunk.all_targets, steps)
    if chunk.left_only is not None:
        parts["left_only"] = (chunk.left_only, chunk.window_splits)
    if chunk.steps_ago is not None:
        parts["steps_ago"] = (chunk.steps_ago, items)
    if chunk.times is not None:
        parts["times"] = (chunk.times.ravel(), 2 * items)
    if chunk.log_counts is not None:
        parts["log_counts"] = _even(float_pairs(chunk.log_counts))
    return parts


def _even(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The entries of [S, K], and where each row begins."""
    return rows.ravel(), np.arange(len(rows) + 1) * rows.shape[1]
