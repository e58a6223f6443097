"""What sharded item tables share, and those that FBGEMM looks up.

TorchRec's train pipeline calls ``input_dist`` of a sharded module with the module's arguments, here
the batch, one batch ahead, and ``compute_and_output_dist`` in the step.

Shapes: T items and C candidates of the batch, n ids of a rank, U rows looked up for all ranks, D
width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.distributed.types import NoWait
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.streamable import Multistreamable

from model.kernels.l2_normalize import join_gradients
from model.tables import upstream
from model.tables.row_exchange import RowExchange
from pipeline.batches.features import Lookup, jagged_items, with_candidates
from pipeline.batches.train_batch import PackedBatch


@dataclass
class LookupContext(Multistreamable):
    """The batch that is looked up, and what was requested for it."""

    batch: Any = None
    request: Any = None

    def record_stream(self, stream: torch.Stream) -> None:
        """The pipeline keeps the batch's memory."""


def requested(ctx: LookupContext) -> KJTListSplitsAwaitable:
    """The result of ``input_dist`` where no host waits: ``[ctx.request]`` after two waits."""
    return KJTListSplitsAwaitable([NoWait(NoWait(ctx.request))], ctx)


def with_lengths(features: KeyedJaggedTensor, rows: tuple[Tensor, ...]) -> dict[str, JaggedTensor]:
    """The rows of each feature, with its lengths."""
    lengths = features.lengths().view(len(rows), -1).unbind()
    return {
        name: JaggedTensor(of_name, lengths=each)
        for name, of_name, each in zip(features.keys(), rows, lengths, strict=True)
    }


class ExchangedCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection, called with a batch."""

    def input_dist(self, ctx: Any, batch: Lookup) -> Any:
        """TorchRec's all-to-all of the batch's ids."""
        return super().input_dist(ctx, batch.features)


class LocalCollection(ShardedEmbeddingCollection):
    """TorchRec's sharded collection on one rank: it looks up without an exchange.

    TorchRec's exchanges features and rows with itself and waits for their counts from the device.
    The rows are the same, bit by bit.
    """

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        (self._names,) = upstream.features_per_lookup(self)
        self._width = upstream.width(self)
        upstream.set_input_dist_ready(self, True)

    def create_context(self) -> LookupContext:
        """The context of a batch."""
        return LookupContext()

    def input_dist(self, ctx: LookupContext, batch: Lookup) -> KJTListSplitsAwaitable:
        """Nothing is sent."""
        ctx.batch, ctx.request = batch, batch.features
        return requested(ctx)

    def compute_and_output_dist(
        self, ctx: LookupContext, features: list[KeyedJaggedTensor]
    ) -> dict[str, JaggedTensor]:
        """Rows [T, D] and [C, D] of the features "item" and "candidate"."""
        (ids,) = features
        assert ids.keys() == self._names, (ids.keys(), self._names)
        (lookup,) = upstream.lookups(self)
        rows = lookup(ids).view(-1, self._width)
        return with_lengths(ids, _Split.apply(rows, ids.length_per_key()[0]))


class RequestingCollection(ShardedEmbeddingCollection):
    """A sharded collection of one table, whose rows are exchanged by a `RowExchange` in training.

    Evaluation on several ranks uses TorchRec's exchange.

    Args:
        draws_candidates: candidates are any items, exchanged like histories; else this shard's.
    """

    def __init__(
        self, *args: Any, exchange: RowExchange, draws_candidates: bool, **given: Any
    ) -> None:
        super().__init__(*args, **given)
        self.exchange, self._draws = exchange, draws_candidates
        self._was_evaluated = False
        upstream.set_input_dist_ready(self, True)

    def create_context(self) -> LookupContext:
        """The context of a batch."""
        return LookupContext()

    def request(self, batch: PackedBatch) -> Any:
        """What the exchange does a batch ahead."""
        return self.exchange.request(batch.requested, batch.slots)

    def input_dist(self, ctx: LookupContext, batch: PackedBatch) -> KJTListSplitsAwaitable:
        """Request the rows of a batch."""
        ctx.batch, ctx.request = batch, self.request(batch)
        return requested(ctx)

    def compute_and_output_dist(
        self, ctx: LookupContext, requests: list[Any]
    ) -> dict[str, JaggedTensor]:
        """Rows [T, D] and [C, D] of the features "item" and "candidate" of the batch."""
        features = ctx.batch.features
        num_items, _ = features.length_per_key()
        candidates = None if self._draws else features.values()[num_items:]
        return with_lengths(features, self.look_up(requests[0], num_items, candidates))

    def look_up(
        self, request: Any, num_items: int, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Rows of the first T requested ids, and of candidates.

        Args:
            candidates: int64 [C], items of this shard; None: the other requested ids.
        """
        raise NotImplementedError(type(self))

    def forward(self, batch: Any) -> dict[str, JaggedTensor]:
        """The same, a batch not ahead; in an evaluation by TorchRec."""
        if self.training:
            return super().forward(batch)
        stock, ctx = ShardedEmbeddingCollection, super().create_context()
        upstream.set_input_dist_ready(self, self._was_evaluated)
        self._was_evaluated = True
        features = stock.input_dist(self, ctx, batch.features).wait().wait()
        return stock.compute_and_output_dist(self, ctx, features)


class FbgemmItemTable(RequestingCollection):
    """Looked up and updated by FBGEMM, for several ranks; not for Adam.

    Empty slots look up row 0 and give it a gradient of zero, by which Adam would move it.
    """

    def look_up(
        self, request: Any, num_items: int, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        local = self.exchange.local_ids(request)
        is_here = local >= 0
        if candidates is not None:
            local = torch.cat([local, candidates - self.exchange.low])
        (lookup,) = upstream.lookups(self)
        none = jagged_items(local[:0], torch.zeros(1, dtype=torch.int64, device=local.device))
        rows = lookup(with_candidates(none, local.clamp(min=0))).view(-1, upstream.width(self))
        rows = _Divided.apply(rows, self.exchange.world_size)  # as TorchRec's exchange does
        here = torch.where(is_here[:, None], rows[: len(is_here)], 0.0)
        own = _OwnRows.apply(here, self.exchange, request)
        return own[:num_items], own[num_items:] if candidates is None else rows[len(is_here) :]


class _Divided(torch.autograd.Function):
    """The same values; their gradients are divided by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return rows.view_as(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.world_size, None


class _OwnRows(torch.autograd.Function):
    """Rows of this rank's ids [n, D], from the rows [U, D] looked up by each rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: RowExchange, request: Any) -> Tensor:
        ctx.exchange, ctx.request = exchange, request
        return exchange.own_rows(rows, request)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (of_rows,) = ctx.exchange.all_gradients([gradient], ctx.request)
        return of_rows, None, None


class _Split(torch.autograd.Function):
    """Rows of both features; their gradients are joined without copying a large catalog's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return rows[:count], rows[count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, items: Tensor, candidates: Tensor) -> tuple[Tensor, None]:
        return join_gradients(items, candidates) if len(candidates) else items, None
