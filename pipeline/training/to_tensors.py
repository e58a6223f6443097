"""From chunks of several steps to the steps' batches.

Chunk    values [..step 0..|..step 1..|..step 2..]    one array each, NumPy
  ToTensors: one page-locked tensor for all, step by step (``pipeline/batches/packing.py``)
ChunkTensors
  batches: a slice each, without a copy
PackedBatch, PackedBatch, PackedBatch
  copied to a device: one copy
  ready: views
TrainBatch
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torchdata.nodes import BaseNode
from torchrec.streamable import Pipelineable

from pipeline.batches.batch import TrainBatch, jagged_items, rounded_up
from pipeline.batches.packing import Packed, float_pairs, pack
from pipeline.training.sampler import Chunk, ChunkStage


@dataclass(eq=False)
class PackedBatch(Pipelineable):
    """A step before it is cut into tensors, which whoever trains it does, on its device.

    Attributes:
        packed: the memory of all its tensors.
        num_windows, num_rows, longest, candidate_range, alike, everyone: as in
            :class:`TrainBatch`.
    """

    packed: Packed
    num_windows: int
    num_rows: int
    longest: int
    candidate_range: tuple[int, int] | None = None
    alike: bool = True
    everyone: Tensor | None = None

    @property
    def drawn_ids(self) -> Tensor:
        """As of :class:`TrainBatch`: they come first."""
        names, sizes = self.packed.names, self.packed.sizes
        return self.packed.words[: sum(sizes[:3]) if "negatives" in names else sizes[0]]

    def copied(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        """The step on ``device``, still packed."""
        words = self.packed.words.to(device, non_blocking=non_blocking)
        return replace(self, packed=replace(self.packed, words=words))

    def ready(self) -> TrainBatch:
        """The batch where it is, with the candidates appended."""
        return self.unpack().with_candidates()

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainBatch:
        """The batch on ``device``, with the candidates appended."""
        return self.copied(device, non_blocking).ready()

    def unpack(self) -> TrainBatch:
        """The batch where it is, without candidates."""
        return TrainBatch.unpacked(
            self.packed,
            num_windows=self.num_windows,
            num_rows=self.num_rows,
            longest=self.longest,
            candidate_range=self.candidate_range,
            alike=self.alike,
            everyone=self.everyone,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it (CUDA only)."""
        for memory in (self.packed.words, self.everyone):
            if memory is not None:
                memory.record_stream(stream)


# A step as the loader hands it over: packed, but for a rank that has no share of it.
Step: TypeAlias = PackedBatch | TrainBatch


@dataclass(eq=False)
class ChunkTensors:
    """The steps of a chunk, ready to be trained on.

    Attributes:
        epoch: the epoch.
        samples: samples consumed by all ranks after each step.
        windows, rows: of each step, rows that are windows, and all rows.
        longest: of each step, at least the length of its longest row.
        packed: the tensors of each step.
        candidate_range: put into each batch.
        alike: of each step, whether its batches have equal shapes on all ranks.
        filler: what a step without rows trains on.
    """

    epoch: int
    samples: list[int]
    windows: list[int]
    rows: list[int]
    longest: list[int]
    packed: list[Packed]
    candidate_range: tuple[int, int] | None
    alike: list[bool]
    filler: TrainBatch

    def batches(self) -> Iterator[tuple[Step, int]]:
        """Each step's batch, and the samples consumed after it."""
        for step, sample in enumerate(self.samples):
            batch: Step = PackedBatch(
                packed=self.packed[step],
                num_windows=self.windows[step],
                num_rows=self.rows[step],
                longest=self.longest[step],
                candidate_range=self.candidate_range,
                alike=self.alike[step],
            )
            if not batch.num_rows:
                drawn = batch.unpack()
                batch = replace(self.filler, negatives=drawn.negatives, log_counts=drawn.log_counts)
            yield batch, sample


class ToTensors(ChunkStage[ChunkTensors]):
    """The chunk's arrays as tensors: a whole chunk costs one allocation.

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
        lengths = np.diff(chunk.offsets)
        longest = [1]  # an epoch's last step, of which this rank has no part
        if len(lengths):
            longest = np.maximum.reduceat(lengths, chunk.row_splits[:-1]).tolist()
        return ChunkTensors(
            epoch=chunk.epoch,
            samples=chunk.step_samples,
            windows=chunk.step_windows.tolist(),
            rows=np.diff(chunk.row_splits).tolist(),
            longest=[rounded_up(each) for each in longest],
            packed=[*pack(_parts(chunk, lengths), self.pin_memory)],
            candidate_range=self.candidate_range,
            alike=[True] * len(chunk.step_samples) if chunk.alike is None else chunk.alike.tolist(),
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

    def _tensor(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(array.shape, dtype=dtype, pin_memory=self.pin_memory)
        tensor.numpy()[:] = array
        return tensor


def _parts(chunk: Chunk, lengths: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What a step consists of, in the order that ``TrainBatch.unpacked`` wants, and the splits."""
    rows, items, masks = chunk.row_splits, chunk.offsets[chunk.row_splits], chunk.mask_splits
    if masks is None:
        masks = np.searchsorted(chunk.masked, items)
    chunk.masked -= np.repeat(items[:-1], np.diff(masks))
    steps = np.arange(len(rows))
    ends = np.diff(rows) + 1  # a step's offsets: one more than rows
    offsets = chunk.offsets[np.arange(rows[-1] + steps[-1]) - np.repeat(steps[:-1], ends)]
    offsets -= np.repeat(items[:-1], ends)
    parts = {"values": (chunk.values, items), "targets": (chunk.targets, masks)}
    if chunk.negatives is not None:
        parts["negatives"] = _even(chunk.negatives)
    parts["lengths"], parts["offsets"] = (lengths, rows), (offsets, rows + steps)
    parts["masked"] = (chunk.masked, masks)
    if chunk.left_only is not None:
        parts["left_only"] = (chunk.left_only, np.cumsum([0, *chunk.step_windows]))
    if chunk.steps_ago is not None:
        parts["steps_ago"] = (chunk.steps_ago, items)
    if chunk.log_counts is not None:
        parts["log_counts"] = _even(float_pairs(chunk.log_counts))
    return parts


def _even(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S, K], and the splits of its rows."""
    return rows.ravel(), np.arange(len(rows) + 1) * rows.shape[1]
