"""What one rank trains on in one step: jagged histories and the positions to predict.

Two windows, ``[7 3 9]`` and ``[4 2]``, V = 10 items (so 11 is the mask token), with one masked
position each, are::

    features["item"]    values   7 11  9 |  4 11      no padding ids, two rows
                        lengths        3 |     2
    masked                  1            |     4      flat positions in the values above
    targets                 3            |     2      the items that stood there

The loader yields a :class:`PackedBatch`; one copy moves it to the device. There it is read as a
:class:`TrainBatch`: views of the same memory, and the candidates. TorchRec's train pipelines copy a
``Pipelineable`` on one CUDA stream and use it on another.

Shapes: B rows, W windows among them, T items, M masked positions, K negatives.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipeline.batches.features import (
    CANDIDATE,
    jagged_items,
    join_candidates,
    tensors_of,
    with_candidates,
)
from pipeline.batches.packing import Packed, as_bools, as_floats


def rounded_up(longest: int) -> int:
    """The next multiple of 8: rows are padded to this, and few different widths occur."""
    return -(-longest // 8) * 8


@dataclass(eq=False)
class TrainBatch(Pipelineable):
    """One rank's step of B rows.

    Tensors are int64 unless noted. If ``steps_ago`` is None, it is each position's distance from
    its row's end; else rows W ... 2 W - 1 are the second streams of the W windows
    (``pipeline/training/two_stream.py``). Times may be unknown (``pipeline/batches/times.py``); a
    masked position has its target's.
    """

    features: KeyedJaggedTensor  # key "item", [T] in B rows; the candidates may need more rows
    masked: Tensor  # [M], flat positions in the items, ascending
    targets: Tensor  # [M], the items there before masking
    num_windows: int  # W, rows other than filler rows
    num_rows: int  # B
    longest: int  # no row has more items than this
    candidate_range: tuple[int, int] | None = None  # half-open; the items that this rank scores
    left_only: Tensor | None = None  # bool [W], windows with left context only
    steps_ago: Tensor | None = None  # [T], number of its window's items after a position
    times: Tensor | None = None  # [T, 2], seconds since 1970 and since the user's item before
    negatives: Tensor | None = None  # [K], scored with the targets instead of the candidate range
    log_counts: Tensor | None = None  # float32 [K], logarithms of the negatives' expected counts
    all_targets: Tensor | None = None  # [1], masked positions of all ranks; None: not counted
    words: Tensor | None = None  # the allocation, if all tensors are views of one

    @property
    def unpacked(self) -> "TrainBatch":
        """This batch."""
        return self

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
        parts = tensors_of(self).items()
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
        parts = tensors_of(self)
        if self.words is not None:  # the other tensors are views of it
            parts = {"features": self.features, "words": self.words}
        for part in parts.values():
            part.record_stream(stream)


@dataclass(eq=False)
class PackedBatch(Pipelineable):
    """A :class:`TrainBatch` whose tensors are views of one allocation.

    Its parts are named as the batch's attributes, and "values", "lengths" and "offsets" of the
    features. "values", "targets" and "negatives" come first: they are looked up as one tensor.

    ``all_windows``: of all ranks, where they pad to the same numbers of positions, rows and masked
    positions: the parts' sizes on any rank follow from these numbers. 0: not counted.

    ``slots``: no rank requests more different rows than this of any rank's shard of the table.
    """

    packed: Packed
    num_windows: int
    num_rows: int
    longest: int
    candidate_range: tuple[int, int] | None = None
    all_windows: int = 0
    slots: int = 0

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        """The batch on ``device``: one copy."""
        words = self.packed.words.to(device, non_blocking=non_blocking)
        return replace(self, packed=replace(self.packed, words=words))

    @property
    def num_items(self) -> int:
        """T."""
        return self.packed.sizes[self.packed.names.index("values")]

    @property
    def requested(self) -> Tensor:
        """Ids of rows that any rank may hold: the items, and a sampled loss's candidates."""
        names, sizes = self.packed.names, self.packed.sizes
        looked_up = 3 if "negatives" in names else 1  # values, targets, negatives
        return self.packed.words[: sum(sizes[:looked_up])]

    @property
    def features(self) -> KeyedJaggedTensor:
        """Items and candidates."""
        return self.unpacked.features

    @cached_property
    def unpacked(self) -> TrainBatch:
        """The batch, with the candidates appended."""
        return replace(self.without_candidates).with_candidates()

    @cached_property
    def without_candidates(self) -> TrainBatch:
        """The batch without candidates: appending them takes several small kernels."""
        return self.unpack()

    def unpack(self) -> TrainBatch:
        """The batch, without candidates: views of the packed memory."""
        parts = self.packed.parts()
        features = jagged_items(parts.pop("values"), parts.pop("lengths"), parts.pop("offsets"))
        if "left_only" in parts:
            parts["left_only"] = as_bools(parts["left_only"])
        if "times" in parts:
            parts["times"] = parts["times"].view(-1, 2)
        if "log_counts" in parts:
            parts["log_counts"] = as_floats(parts["log_counts"], parts["negatives"].numel())
        return TrainBatch(
            features=features,
            num_windows=self.num_windows,
            num_rows=self.num_rows,
            longest=self.longest,
            candidate_range=self.candidate_range,
            words=self.packed.words,
            **parts,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it (CUDA only)."""
        self.packed.words.record_stream(stream)
        if "unpacked" in vars(self):
            self.unpacked.record_stream(stream)
