"""From chunks of several steps to the steps' batches.

Chunk    values [..step 0..|..step 1..|..step 2..]    one array each, NumPy
  ToTensors: one page-locked tensor each
ChunkTensors
  batches: slices, without a copy
TrainBatch, TrainBatch, TrainBatch
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import BaseNode

from pipeline.batch import TrainBatch, jagged_items, rounded_up
from pipeline.samples import Chunk, ChunkStage


@dataclass(eq=False)
class ChunkTensors:
    """The steps of a chunk, ready to be cut apart: S steps, B rows, T items, M masked positions.

    Attributes:
        epoch: the epoch.
        samples: samples consumed by all ranks after each step.
        longest: of each step, at least the length of its longest row.
        windows, rows, items, masks: where each step begins among the rows that are windows, all
            rows, items and masked positions, and where the last one ends.
        values: int64 [T].
        lengths: int64 [B].
        masked: int64 [M], flat positions in the items of their step.
        targets: int64 [M].
        left_only: bool [windows] or None.
        steps_ago: int64 [T] or None.
        negatives, log_counts: int64 and float32 [S, K] or None.
        candidate_range: put into each batch.
        filler: what a step without rows trains on.
    """

    epoch: int
    samples: list[int]
    longest: list[int]
    windows: list[int]
    rows: list[int]
    items: list[int]
    masks: list[int]
    values: Tensor
    lengths: Tensor
    masked: Tensor
    targets: Tensor
    left_only: Tensor | None
    steps_ago: Tensor | None
    negatives: Tensor | None
    log_counts: Tensor | None
    candidate_range: tuple[int, int] | None
    filler: TrainBatch

    def batches(self) -> Iterator[tuple[TrainBatch, int]]:
        """Each step's batch, and the samples consumed after it."""
        for step, sample in enumerate(self.samples):
            batch = self._batch(step) if self.rows[step] < self.rows[step + 1] else self.filler
            if self.negatives is not None and self.log_counts is not None:
                batch.negatives, batch.log_counts = self.negatives[step], self.log_counts[step]
            yield batch, sample

    def _batch(self, step: int) -> TrainBatch:
        rows = slice(self.rows[step], self.rows[step + 1])
        items = slice(self.items[step], self.items[step + 1])
        masks = slice(self.masks[step], self.masks[step + 1])
        windows = slice(self.windows[step], self.windows[step + 1])
        return TrainBatch(
            features=jagged_items(self.values[items], self.lengths[rows]),
            masked=self.masked[masks],
            targets=self.targets[masks],
            num_windows=windows.stop - windows.start,
            num_rows=rows.stop - rows.start,
            longest=self.longest[step],
            candidate_range=self.candidate_range,
            left_only=None if self.left_only is None else self.left_only[windows],
            steps_ago=None if self.steps_ago is None else self.steps_ago[items],
        )


class ToTensors(ChunkStage[ChunkTensors]):
    """The chunk's arrays as tensors: a whole chunk costs one allocation each.

    Args:
        source: masked chunks.
        mask_token: what a filler row is made of.
        candidate_range: put into each batch.
        pin_memory: into page-locked memory.
    """

    def __init__(
        self,
        source: BaseNode[Chunk],
        mask_token: int,
        candidate_range: tuple[int, int] | None = None,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(source)
        self.mask_token, self.candidate_range = mask_token, candidate_range
        self.pin_memory = pin_memory

    def apply(self, chunk: Chunk) -> ChunkTensors:
        value_splits = chunk.offsets[chunk.row_splits]
        mask_splits = chunk.mask_splits
        if mask_splits is None:
            mask_splits = np.searchsorted(chunk.masked, value_splits)
        chunk.masked -= np.repeat(value_splits[:-1], np.diff(mask_splits))
        lengths = np.diff(chunk.offsets)
        longest = [1]  # an epoch's last step, of which this rank has no part
        if len(lengths):
            longest = np.maximum.reduceat(lengths, chunk.row_splits[:-1]).tolist()
        return ChunkTensors(
            epoch=chunk.epoch,
            samples=chunk.step_samples,
            windows=[0, *np.cumsum(chunk.step_windows).tolist()],
            longest=[rounded_up(each) for each in longest],
            rows=chunk.row_splits.tolist(),
            items=value_splits.tolist(),
            masks=mask_splits.tolist(),
            values=self._tensor(chunk.values, torch.int64),
            lengths=self._tensor(lengths, torch.int64),
            masked=self._tensor(chunk.masked, torch.int64),
            targets=self._tensor(chunk.targets, torch.int64),
            left_only=self._optional(chunk.left_only, torch.bool),
            steps_ago=self._optional(chunk.steps_ago, torch.int64),
            negatives=self._optional(chunk.negatives, torch.int64),
            log_counts=self._optional(chunk.log_counts, torch.float32),
            candidate_range=self.candidate_range,
            filler=self._filler(),
        )

    def _filler(self) -> TrainBatch:
        """What a rank without a share trains on: one mask token, nothing masked, no window."""
        row, nothing = np.array([self.mask_token]), np.empty(0)
        return TrainBatch(
            features=jagged_items(
                self._tensor(row, torch.int64), self._tensor(np.ones(1), torch.int64)
            ),
            masked=self._tensor(nothing, torch.int64),
            targets=self._tensor(nothing, torch.int64),
            num_windows=0,
            num_rows=1,
            longest=rounded_up(1),
            candidate_range=self.candidate_range,
        )

    def _optional(self, array: np.ndarray | None, dtype: torch.dtype) -> Tensor | None:
        return None if array is None else self._tensor(array, dtype)

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(array.shape, dtype=dtype, pin_memory=self.pin_memory)
        tensor.numpy()[:] = array
        return tensor
