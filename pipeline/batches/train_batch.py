"""What one rank trains on in one step: jagged histories and the positions to predict.

Two windows, ``[7 3 9]`` and ``[4 2]``, V = 10 items (so 11 is the mask token), with one masked
position each, are::

    features["item"]    values   7 11  9 |  4 11      no padding ids, two rows
                        lengths        3 |     2
    masked                  1            |     4      flat positions in the values above
    targets                 3            |     2      the items that stood there

The loader hands out a :class:`PackedBatch`, all tensors in one piece of memory, so that one copy
takes a step to the device. There it becomes a :class:`TrainBatch`, views of that memory, with the
candidates appended (``features.py``). Both implement :class:`torchrec.streamable.Pipelineable`, so
that TorchRec's train pipelines copy them on one CUDA stream and use them on another.

Shapes: B rows, W windows among them, T items, M masked positions, K negatives.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipeline.batches.features import CANDIDATE, jagged_items, join_candidates, with_candidates
from pipeline.batches.packing import Packed, as_bools, as_floats


def rounded_up(longest: int) -> int:
    """The next multiple of 8: rows are padded to this, and few different widths occur."""
    return -(-longest // 8) * 8


@dataclass(eq=False)
class TrainBatch(Pipelineable):
    """One rank's step of B rows, T items and M masked positions.

    Attributes:
        features: key "item" (int64 values [T], int64 lengths [B]) and, after
            :meth:`with_candidates`, key "candidate". The features may have more rows, all empty.
        masked: int64 [M], flat positions in the item values, ascending.
        targets: int64 [M], the item ids at these positions before masking.
        num_windows: rows that hold a real window; filler rows are not counted.
        num_rows: B, filler rows included.
        longest: no row has more items than this; known on the host.
        candidate_range: half-open range of the item ids that this rank scores, or None.
        left_only: bool [W], which of the first W rows, the windows, have positions that see only
            earlier ones; None: none.
        steps_ago: int64 [T], how many items of its history come after a position; None: as many as
            positions of its row. With it, rows W ... 2 W - 1 are the second stream of the first W
            (``pipeline/training/two_stream.py``).
        negatives: int64 [K], items to score besides the targets; None: candidate_range says.
        log_counts: float32 [K], logarithms of the negatives' expected counts.
        words: the memory that all these tensors are views of; None: each has its own.
        equal_shapes: this step's batches have the same shapes on all ranks, as far as the ranks
            agree on sizes at all (``pipeline/training/shape_buckets.py``).
    """

    features: KeyedJaggedTensor
    masked: Tensor
    targets: Tensor
    num_windows: int
    num_rows: int
    longest: int
    candidate_range: tuple[int, int] | None = None
    left_only: Tensor | None = None
    steps_ago: Tensor | None = None
    negatives: Tensor | None = None
    log_counts: Tensor | None = None
    words: Tensor | None = None
    equal_shapes: bool = True

    @property
    def ids(self) -> Tensor:
        """int64 [T + C], the items and the candidates."""
        return self.features.values()

    @property
    def row_offsets(self) -> Tensor:
        """int64 [B + 1], where the rows begin in the items."""
        return self.features.offsets()[: self.num_rows + 1]

    def to(self, device: torch.device, non_blocking: bool = False) -> "TrainBatch":
        """A copy on ``device``, with the candidates appended."""
        parts = self._parts().items()
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in parts}
        return replace(self, **moved | {"words": None}).with_candidates()

    def with_candidates(self) -> "TrainBatch":
        """This batch, with the candidates appended to its features if there are any."""
        if CANDIDATE in self.features.keys():  # noqa: SIM118 - not a dict
            return self
        candidates: tuple[int, int] | Tensor | None = self.candidate_range
        if self.negatives is not None:
            count = self.targets.numel() + self.negatives.numel()
            if self.words is not None:  # they follow the items in memory
                values = self.words[: self.features.values().numel() + count]
                self.features = join_candidates(self.features, values, count)
                return self
            candidates = torch.cat([self.targets, self.negatives])
        if candidates is not None:
            self.features = with_candidates(self.features, candidates)
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until ``stream`` is done with it (CUDA only)."""
        for part in self._parts().values():
            part.record_stream(stream)

    def _parts(self) -> dict[str, Any]:
        """The features and all tensors there are."""
        kinds = (KeyedJaggedTensor, Tensor)
        return {name: part for name, part in vars(self).items() if isinstance(part, kinds)}


@dataclass(eq=False)
class PackedBatch(Pipelineable):
    """A step whose tensors lie in one piece of memory, named as the attributes of TrainBatch.

    Those of the features are "values", "lengths" and "offsets"; "values", "targets" and "negatives"
    come first, in this order.

    Attributes:
        packed: the memory.
        num_windows, num_rows, longest, candidate_range, equal_shapes: as in :class:`TrainBatch`.
    """

    packed: Packed
    num_windows: int
    num_rows: int
    longest: int
    candidate_range: tuple[int, int] | None = None
    equal_shapes: bool = True

    def move(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        """The step on ``device``, still packed: one copy."""
        words = self.packed.words.to(device, non_blocking=non_blocking)
        return replace(self, packed=replace(self.packed, words=words))

    def to(self, device: torch.device, non_blocking: bool = False) -> TrainBatch:
        """The batch on ``device``, with the candidates appended."""
        return self.move(device, non_blocking).unpack().with_candidates()

    def unpack(self) -> TrainBatch:
        """The batch where it is: views, without candidates."""
        parts = self.packed.parts()
        features = jagged_items(parts.pop("values"), parts.pop("lengths"), parts.pop("offsets"))
        if "left_only" in parts:
            parts["left_only"] = as_bools(parts["left_only"])
        if "log_counts" in parts:
            parts["log_counts"] = as_floats(parts["log_counts"], parts["negatives"].numel())
        return TrainBatch(
            features=features,
            **parts,
            num_windows=self.num_windows,
            num_rows=self.num_rows,
            longest=self.longest,
            candidate_range=self.candidate_range,
            words=self.packed.words,
            equal_shapes=self.equal_shapes,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it (CUDA only)."""
        self.packed.words.record_stream(stream)
