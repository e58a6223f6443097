"""From chunks of several steps to the steps' batches.

Chunk            values [..step 0..|..step 1..|..step 2..]    one NumPy array each
  ToTensors      one page-locked tensor for the chunk (``pipeline/batches/packing.py``)
PackedSteps
  batches        a slice each, without a copy
PackedBatch, PackedBatch, PackedBatch
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torchdata.nodes import BaseNode

from pipeline.batches.packing import Packed, float_pairs, pack
from pipeline.batches.train_batch import PackedBatch, rounded_up
from pipeline.stage import MapStage
from pipeline.training.chunks import MaskedWindows


@dataclass(eq=False)
class PackedSteps:
    """The steps of a chunk, packed.

    Attributes:
        epoch: the epoch.
        samples: samples consumed by all ranks after each step.
        windows, rows: of each step, rows that are windows, and all rows.
        longest: of each step, at least the length of its longest row.
        packed: the tensors of each step.
        candidate_range: put into each batch.
        equal_shapes: of each step, whether its batches have the same shapes on all ranks.
    """

    epoch: int
    samples: list[int]
    windows: list[int]
    rows: list[int]
    longest: list[int]
    packed: list[Packed]
    candidate_range: tuple[int, int] | None
    equal_shapes: list[bool]

    def batches(self) -> Iterator[tuple[PackedBatch, int]]:
        """Each step's batch, and the samples consumed after it."""
        for step, sample in enumerate(self.samples):
            batch = PackedBatch(
                packed=self.packed[step],
                num_windows=self.windows[step],
                num_rows=self.rows[step],
                longest=self.longest[step],
                candidate_range=self.candidate_range,
                equal_shapes=self.equal_shapes[step],
            )
            yield batch, sample


class ToTensors(MapStage[MaskedWindows, PackedSteps]):
    """The chunk's arrays as tensors: one allocation a chunk.

    Args:
        source: masked windows.
        mask_token: the item of a filler row.
        candidate_range: put into each batch.
        pin_memory: use page-locked memory.
    """

    def __init__(
        self,
        source: BaseNode[MaskedWindows],
        mask_token: int,
        candidate_range: tuple[int, int] | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(source)
        self.mask_token, self.candidate_range = mask_token, candidate_range
        self.pin_memory = pin_memory

    def apply(self, chunk: MaskedWindows) -> PackedSteps:
        if chunk.row_splits[-1] == 0:
            chunk = self._filled(chunk)
        lengths, equal = np.diff(chunk.offsets), chunk.equal_shapes
        longest = np.maximum.reduceat(lengths, chunk.row_splits[:-1]).tolist()
        return PackedSteps(
            epoch=chunk.epoch,
            samples=chunk.step_samples,
            windows=chunk.step_windows.tolist(),
            rows=np.diff(chunk.row_splits).tolist(),
            longest=[rounded_up(each) for each in longest],
            packed=[*pack(_parts(chunk, lengths), self.pin_memory)],
            candidate_range=self.candidate_range,
            equal_shapes=[True] * len(chunk.step_samples) if equal is None else equal.tolist(),
        )

    def _filled(self, chunk: MaskedWindows) -> MaskedWindows:
        """An epoch's last step, of which this rank has no row, with a lone mask token.

        The token is no target, so that it has no loss.
        """
        return replace(
            chunk,
            values=np.array([self.mask_token], dtype=chunk.values.dtype),
            offsets=np.array([0, 1]),
            row_splits=np.array([0, 1]),
            steps_ago=None if chunk.steps_ago is None else np.zeros(1, dtype=np.int64),
        )


def _parts(chunk: MaskedWindows, lengths: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The parts of all steps, in the order that :class:`PackedBatch` wants, and their splits."""
    rows, items, masks = chunk.row_splits, chunk.offsets[chunk.row_splits], chunk.mask_splits
    masked = chunk.masked - np.repeat(items[:-1], np.diff(masks))
    steps = np.arange(len(rows))
    ends = np.diff(rows) + 1  # a step's offsets: one more than rows
    offsets = chunk.offsets[np.arange(rows[-1] + steps[-1]) - np.repeat(steps[:-1], ends)]
    offsets -= np.repeat(items[:-1], ends)
    parts = {"values": (chunk.values, items), "targets": (chunk.targets, masks)}
    if chunk.negatives is not None:
        parts["negatives"] = _even(chunk.negatives)
    parts["lengths"], parts["offsets"] = (lengths, rows), (offsets, rows + steps)
    parts["masked"] = (masked, masks)
    if chunk.left_only is not None:
        parts["left_only"] = (chunk.left_only, chunk.window_splits)
    if chunk.steps_ago is not None:
        parts["steps_ago"] = (chunk.steps_ago, items)
    if chunk.log_counts is not None:
        parts["log_counts"] = _even(float_pairs(chunk.log_counts))
    return parts


def _even(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, K], and the splits of its rows."""
    return rows.ravel(), np.arange(len(rows) + 1) * rows.shape[1]
