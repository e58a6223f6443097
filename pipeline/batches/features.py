"""Items and candidates as one KeyedJaggedTensor, the input of TorchRec's lookup.

The output layer is tied to the item table: candidates are a second feature of the same table. A
range of candidates is made on the device and spread over the rows, because the embedding kernels
work row by row. Many candidates get more rows, in which there are no items::

    features["item"]       values   7 11  9 |  4 11      two rows, no padding
                           lengths        3 |     2
    features["candidate"]  values   1 2 3 4 5 | 6 7 8 9 10      candidate_range (1, 11)
                           lengths          5 |          5

With attributes of the items, all their rows are a third feature, ``attribute``, spread as evenly.

Shapes: B rows, T items, C candidates, A attributes, S rows of each feature.
"""

from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

ITEM = "item"
CANDIDATE = "candidate"
ATTRIBUTE = "attribute"
# FBGEMM looks up a row with one warp, which needs milliseconds for thousands of items.
_CANDIDATES_A_ROW = 64
# Ids of streams under capture; none is used twice.
_CAPTURES = count(-1, -1)


class Lookup(Protocol):
    """What the item table is called with: a batch."""

    @property
    def features(self) -> KeyedJaggedTensor:
        """Ids under the keys "item" and "candidate"."""


class Ids(NamedTuple):
    """Ids to look up without a batch."""

    features: KeyedJaggedTensor


def tensors_of(batch: object) -> dict[str, Any]:
    """The attributes of a batch that are tensors or features, by name."""
    kinds = (KeyedJaggedTensor, Tensor)
    return {name: part for name, part in vars(batch).items() if isinstance(part, kinds)}


def jagged_items(
    values: Tensor, lengths: Tensor, offsets: Tensor | None = None
) -> KeyedJaggedTensor:
    """Rows of items, int64 [T], under the key "item".

    Args:
        lengths: int64 [B], items per row.
        offsets: int64 [B + 1], where rows begin; None: TorchRec sums the lengths when it needs to.
    """
    return KeyedJaggedTensor(
        keys=[ITEM],
        values=values,
        lengths=lengths,
        offsets=offsets,
        stride=lengths.numel(),
        # Known from the shapes; without it TorchRec sums the lengths and waits for the device.
        length_per_key=[values.numel()],
    )


def with_candidates(
    features: KeyedJaggedTensor, candidates: tuple[int, int] | Tensor
) -> KeyedJaggedTensor:
    """The features with candidates, a half-open range or int64 [C], under the key "candidate"."""
    values = features.values()
    if isinstance(candidates, tuple):
        candidates = items_of(candidates, values.device)
    return join_candidates(features, torch.cat([values, candidates]), candidates.numel())


def items_of(candidate_range: tuple[int, int], device: torch.device) -> Tensor:
    """The ids of a half-open range, int64 [C]."""
    return _range(candidate_range, device, _stream_id(device))


def join_candidates(features: KeyedJaggedTensor, values: Tensor, count: int) -> KeyedJaggedTensor:
    """The features with the last ``count`` of ``values``, int64 [T + C], as candidates."""
    lengths, offsets = features.lengths(), features.offsets_or_none()
    device, items = lengths.device, values.numel() - count
    place = count, lengths.numel(), device, _stream_id(device)
    if offsets is not None:
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


def with_attributes(
    features: KeyedJaggedTensor, attributes: tuple[int, int] | None
) -> KeyedJaggedTensor:
    """Items and candidates with a half-open range of ids under the key "attribute".

    The same features if ``attributes`` is None.
    """
    if attributes is None:
        return features
    values, lengths, offsets = features.values(), features.lengths(), features.offsets_or_none()
    device, stream = values.device, _stream_id(values.device)
    count, rows = attributes[1] - attributes[0], features.stride()
    evenly = _evenly(count, rows, device, stream)
    if offsets is not None:
        offsets = torch.cat([offsets, values.numel() + evenly.cumsum(0)])
    return KeyedJaggedTensor(
        keys=[*features.keys(), ATTRIBUTE],
        values=torch.cat([values, _range(attributes, device, stream)]),
        lengths=torch.cat([lengths, evenly]),
        offsets=offsets,
        stride=rows,
        length_per_key=[*features.length_per_key(), count],
    )


# Cached per stream: another CUDA stream would have to wait until the tensors are written.


@lru_cache(maxsize=8)
def _range(candidate_range: tuple[int, int], device: torch.device, stream_id: int) -> Tensor:
    """int64 [C]; few are cached, because a catalog may be large."""
    return torch.arange(*candidate_range, dtype=torch.int64, device=device)


@lru_cache(maxsize=64)
def _spread(count: int, num_rows: int, device: torch.device, stream_id: int) -> Tensor:
    """The lengths to append to those of the B item rows: int64 [2 S - B].

    S - B rows without items, then ``count`` candidates spread over S >= B rows.
    """
    rows = max(num_rows, -(-count // _CANDIDATES_A_ROW))
    lengths = torch.zeros(2 * rows - num_rows, dtype=torch.int64, device=device)
    lengths[rows - num_rows :] = _evenly(count, rows, device, stream_id)
    return lengths


@lru_cache(maxsize=64)
def _evenly(count: int, rows: int, device: torch.device, stream_id: int) -> Tensor:
    """Lengths of rows that hold ``count`` ids: int64 [S]."""
    lengths = torch.full((rows,), count // rows, dtype=torch.int64, device=device)
    lengths[: count % rows] += 1
    return lengths


@lru_cache(maxsize=64)
def _ends(items: int, count: int, num_rows: int, device: torch.device, stream_id: int) -> Tensor:
    """The offsets to append to those of the B item rows: int64 [2 S - B]."""
    return items + _spread(count, num_rows, device, stream_id).cumsum(0)


def _stream_id(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    if torch.cuda.is_current_stream_capturing():  # a CUDA graph writes its own at every replay
        return next(_CAPTURES)
    return torch.cuda.current_stream(device).cuda_stream
