"""A sharded collection of a single rank: it looks up without an exchange.

TorchRec's forward exchanges features and rows between ranks and waits for their counts from the
device. A single rank only needs the lookup. The rows are the same, bit by bit.

Shapes: T items and C candidates of the batch, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from model.kernels.l2_normalize import join_gradients
from model.tables import upstream
from model.tables.item_table import with_lengths


class LocalCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection with a forward for one rank.

    A table in several shards, each with some of its columns, keeps TorchRec's forward.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        names = [name for each in upstream.features_per_lookup(self) for name in each]
        lookups = [*upstream.lookups(self)]
        self._is_whole = len(lookups) == 1 and len(set(names)) == len(names)
        self._names, self._width = names, upstream.width(self)

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Rows [T, D] and [C, D] of the features "item" and "candidate"."""
        if not self._is_whole:
            return super().forward(features)
        assert features.keys() == self._names, (features.keys(), self._names)
        (lookup,) = upstream.lookups(self)
        rows = lookup(features).view(-1, self._width)
        return with_lengths(features, _Split.apply(rows, features.length_per_key()[0]))


class _Split(torch.autograd.Function):
    """Rows of both features; their gradients are joined without copying a large catalog's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return rows[:count], rows[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, items: Tensor, candidates: Tensor) -> tuple[Tensor, None]:
        return join_gradients(items, candidates) if len(candidates) else items, None
