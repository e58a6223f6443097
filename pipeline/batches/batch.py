"""What one rank trains or evaluates in one step: jagged histories and the positions to predict.

Two windows, ``[7 3 9]`` and ``[4 2]``, V = 10 items (so 11 is the mask token), with one masked
position each, travel as::

    features["item"]    values   7 11  9 |  4 11      no padding ids, two rows
                        lengths        3 |     2
    masked                  1            |     4      flat positions in the values above
    targets                 3            |     2      the items that stood there

The model ties its output layer to the item table by looking candidates up as a second feature of
the same table. A dense range of candidates never crosses from host to device: ``to(device)``
appends it there, spread over the rows, because the embedding kernels work row by row. Where there
are few rows for many candidates, empty rows of items are added to hold them::

    features["candidate"]  values  1 2 3 4 5 | 6 7 8 9 10      candidate_range (1, 11)
                           lengths         5 |          5

A step with sampled negatives has its targets and them as candidates instead, in this order.
Both batches implement :class:`torchrec.streamable.Pipelineable`, so that the train pipelines of
TorchRec can copy them on one CUDA stream and use them on another.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from pipeline.batches.packing import Packed, as_bools, as_floats

ITEM = "item"
CANDIDATE = "candidate"
Candidates = tuple[int, int] | Tensor
# FBGEMM looks a row up with one warp: a row of thousands would keep it for milliseconds.
_CANDIDATES_A_ROW = 64
# Names of streams under capture, none of which comes again.
_CAPTURES = count(-1, -1)


def rounded_up(longest: int) -> int:
    """The next multiple of 8: rows are padded to this, and few different widths occur."""
    return -(-longest // 8) * 8


def jagged_items(
    values: Tensor, lengths: Tensor, offsets: Tensor | None = None
) -> KeyedJaggedTensor:
    """Rows of items under the key "item".

    Args:
        values: int64 [T], the rows' item ids one after the other.
        lengths: int64 [B], items per row; sums to T.
        offsets: int64 [B + 1], where rows begin; None: TorchRec sums the lengths when it asks.
    """
    return KeyedJaggedTensor(
        keys=[ITEM],
        values=values,
        lengths=lengths,
        offsets=offsets,
        stride=lengths.numel(),
        # Known from the shapes: left out, TorchRec would sum the lengths and wait for the device.
        length_per_key=[values.numel()],
    )


@dataclass(eq=False)
class TrainBatch(Pipelineable):
    """One rank's step of B rows, T items and M masked positions.

    Attributes:
        features: key "item" (int64 values [T], int64 lengths [B]) and, once on the device, key
            "candidate" (see the module docstring).
        masked: int64 [M], flat positions in the item values, ascending.
        targets: int64 [M], the item ids at these positions before masking.
        num_windows: rows that hold a real window; filler rows are not counted.
        num_rows: B, filler rows included. The features may have more rows, all of them empty.
        longest: no row has more items than this; known on the host.
        candidate_range: half-open range of the item ids that this rank scores, or None.
        left_only: bool [W], which of the first W rows, the windows, have positions that see only
            what came before them; None: none.
        steps_ago: int64 [T], how many items of its history come after a position; None: as many as
            positions of its row. Given, rows W ... 2 W - 1 are the second stream of the first W
            (``pipeline/training/two_stream.py``).
        negatives: int64 [K], items to score besides the targets; None: candidate_range says.
        log_counts: float32 [K], logarithms of how often each was to be expected among them.
        packed: the memory that all these tensors are views of; None: each has its own.
        alike: this step's batches have equal shapes on all ranks, as far as these ask each other.
        everyone: int64 [U], the ids of all ranks, gathered; None: not yet, or never.
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
    packed: Packed | None = None
    alike: bool = True
    everyone: Tensor | None = None
    _own: KeyedJaggedTensor | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [T + C], this rank's items, and what it scores."""
        return (self._own or self.features).values()

    @property
    def drawn_ids(self) -> Tensor:
        """int64 [n], this rank's items, and candidates if they were drawn: not those of a range."""
        ids = self.features.values()
        return ids if self.negatives is not None else ids[: self.features.length_per_key()[0]]

    @property
    def row_offsets(self) -> Tensor:
        """int64 [B + 1], where this rank's rows begin in its items."""
        return (self._own or self.features).offsets()[: self.num_rows + 1]

    @property
    def is_for_all(self) -> bool:
        """Whether the features are the ids of all ranks, not of this one."""
        return self._own is not None

    def look_up_for_all(self, features: KeyedJaggedTensor) -> None:
        """Put other features, of all ranks' ids, in the place of this rank's own."""
        self._own, self.features = self.features, features

    @classmethod
    def unpacked(cls, packed: Packed, **known: Any) -> "TrainBatch":
        """A batch of views of ``packed``, whose parts are named as the attributes.

        Those of the features are "values", "lengths" and "offsets"; "values", "targets" and
        "negatives" come first, in this order.

        Args:
            known: the attributes that are no tensors.
        """
        parts = packed.parts()
        features = jagged_items(parts.pop("values"), parts.pop("lengths"), parts.pop("offsets"))
        if "left_only" in parts:
            parts["left_only"] = as_bools(parts["left_only"])
        if "log_counts" in parts:
            parts["log_counts"] = as_floats(parts["log_counts"], parts["negatives"].numel())
        return cls(features=features, **parts, **known, packed=packed)

    def to(self, device: torch.device, non_blocking: bool = False) -> "TrainBatch":
        """A copy on ``device``, with the candidates appended."""
        parts = self._parts().items()
        moved = {name: part.to(device, non_blocking=non_blocking) for name, part in parts}
        return replace(self, packed=None, **moved).with_candidates()

    def unpack(self) -> "TrainBatch":
        """Itself; what is still packed is a :class:`~pipeline.training.to_tensors.PackedBatch`."""
        return self

    # As a packed one is asked for a copy, and for its tensors.
    copied, ready = to, unpack

    def with_candidates(self) -> "TrainBatch":
        """This batch, the candidates appended to its features where they are."""
        candidates: Candidates | None = self.candidate_range
        if self.negatives is not None:
            if self.packed is not None:  # where they stand behind the items already
                count = self.targets.numel() + self.negatives.numel()
                joined = self.packed.words[: self.features.values().numel() + count]
                self.features = _joined(self.features, joined, count)
                return self
            candidates = torch.cat([self.targets, self.negatives])
        self.features = _with_candidates_once(self.features, candidates)
        return self

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until ``stream`` is done with it (CUDA only)."""
        parts = self._parts()
        if self.packed is not None:
            made = ("features", "everyone")
            parts = {name: part for name, part in parts.items() if name in made}
            parts["words"] = self.packed.words
        for part in parts.values():
            part.record_stream(stream)

    def _parts(self) -> dict[str, Any]:
        """The features and all tensors there are."""
        kinds = (KeyedJaggedTensor, Tensor)
        return {name: part for name, part in vars(self).items() if isinstance(part, kinds)}


@dataclass(eq=False)
class EvalBatch(Pipelineable):
    """One rank's B users to evaluate; each row ends with the mask token in the target's place.

    Attributes:
        features: as in :class:`TrainBatch`; a row is the user's last known items and the mask
            token.
        masked: int64 [B], the flat position of each row's mask token.
        targets: int64 [B], the held-out item.
        users: int64 [B], the user's number in the sequence store; -1 for a filler row, which must
            not be counted.
        negatives: int64 [B, N], distinct items the user never rated; 0 where there are too few.
        seen: int64 [S], distinct items known before the target, over the whole history, target
            excluded; user after user.
        seen_offsets: int64 [B + 1], row b's seen items are ``seen[seen_offsets[b]:seen_offsets[b
            + 1]]``.
        num_rows, longest: as in :class:`TrainBatch`.
        candidate_range: as in :class:`TrainBatch`.
    """

    features: KeyedJaggedTensor
    masked: Tensor
    targets: Tensor
    users: Tensor
    negatives: Tensor
    seen: Tensor
    seen_offsets: Tensor
    num_rows: int
    longest: int
    candidate_range: tuple[int, int] | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "EvalBatch":
        """A copy on ``device``, with the candidates appended."""
        moved = [tensor.to(device, non_blocking=non_blocking) for tensor in self._tensors()]
        features = self.features.to(device, non_blocking=non_blocking)
        features = _with_candidates_once(features, self.candidate_range)
        return EvalBatch(features, *moved, self.num_rows, self.longest, self.candidate_range)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of every tensor until ``stream`` is done with it (CUDA only)."""
        self.features.record_stream(stream)
        for tensor in self._tensors():
            tensor.record_stream(stream)

    def pin_memory(self) -> "EvalBatch":
        """A copy in page-locked memory, or this very batch where there is no CUDA."""
        if not torch.cuda.is_available():
            return self
        pinned = [tensor.pin_memory() for tensor in self._tensors()]
        return EvalBatch(
            self.features.pin_memory(), *pinned, self.num_rows, self.longest, self.candidate_range
        )

    def _tensors(self) -> tuple[Tensor, ...]:
        """All tensors outside of the features, in the order of the fields."""
        return (
            self.masked,
            self.targets,
            self.users,
            self.negatives,
            self.seen,
            self.seen_offsets,
        )


def _with_candidates_once(
    features: KeyedJaggedTensor, candidates: Candidates | None
) -> KeyedJaggedTensor:
    """The features with candidates appended, if there are any and they have none yet."""
    if candidates is None or CANDIDATE in features.keys():  # noqa: SIM118 - not a dict
        return features
    return with_candidates(features, candidates)


def with_candidates(features: KeyedJaggedTensor, candidates: Candidates) -> KeyedJaggedTensor:
    """The key "item" as it is, and candidates under the key "candidate".

    Args:
        features: key "item".
        candidates: a half-open range of items, or items int64 [C] on the features' device.
    """
    values = features.values()
    if isinstance(candidates, tuple):
        candidates = _range(candidates, values.device, _stream_id(values.device))
    return _joined(features, torch.cat([values, candidates]), candidates.numel())


def _joined(features: KeyedJaggedTensor, values: Tensor, count: int) -> KeyedJaggedTensor:
    """The features with the last ``count`` of ``values``, int64 [T + C], as candidates."""
    lengths, offsets = features.lengths(), features.offsets_or_none()
    device, items = lengths.device, values.numel() - count
    place = count, lengths.numel(), device, _stream_id(device)
    if offsets is not None:  # else whoever needs them sums the lengths once more
        offsets = torch.cat([offsets, _ends(items, *place)])
    lengths = torch.cat([lengths, _spread(*place)])
    return KeyedJaggedTensor(
        keys=[ITEM, CANDIDATE],
        values=values,
        lengths=lengths,
        offsets=offsets,
        stride=lengths.numel() // 2,
        length_per_key=[items, count],
    )


# ``stream_id`` keeps the cached tensors of one CUDA stream away from another, which would otherwise
# have to wait until they are written.


@lru_cache(maxsize=4)
def _range(candidate_range: tuple[int, int], device: torch.device, stream_id: int) -> Tensor:
    """int64 [C], made on ``device``: a catalog may be large, so few are kept."""
    return torch.arange(*candidate_range, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _spread(count: int, num_rows: int, device: torch.device, stream_id: int) -> Tensor:
    """What stands behind the lengths of B rows of items: int64 [2 S - B].

    Zeros for S - B more rows of items, then how many of ``count`` candidates stand in each of
    S >= B rows.
    """
    rows = max(num_rows, -(-count // _CANDIDATES_A_ROW))
    lengths = torch.full((2 * rows - num_rows,), count // rows, dtype=torch.int64, device=device)
    lengths[: rows - num_rows] = 0
    lengths[rows - num_rows :][: count % rows] += 1
    return lengths


@lru_cache(maxsize=64)
def _ends(items: int, count: int, num_rows: int, device: torch.device, stream_id: int) -> Tensor:
    """What stands behind the offsets of B rows of so many items: int64 [2 S - B]."""
    return items + _spread(count, num_rows, device, stream_id).cumsum(0)


def _stream_id(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():  # a graph makes its own, whenever it runs
        return next(_CAPTURES)
    return torch.cuda.current_stream(device).cuda_stream
