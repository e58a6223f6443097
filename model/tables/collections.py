"""What sharded item tables share, and those that FBGEMM looks up.

TorchRec's train pipeline calls ``input_dist`` of a sharded module with the module's arguments, here
the batch, one batch ahead, and ``compute_and_output_dist`` in the step.

Shapes: T items and C candidates of the batch, A attributes, n ids of a rank, U rows looked up for
all ranks, D width.
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

from model.bert4rec import ItemTable
from model.kernels.l2_normalize import join_gradients
from model.tables import upstream
from model.tables.row_exchange import RowExchange
from pipeline.batches.features import (
    Lookup,
    ids_of,
    jagged_items,
    with_attributes,
    with_candidates,
)
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


def joined(gradients: list[Tensor]) -> Tensor:
    """The gradient of a tensor from those of its parts."""
    if len(gradients) == 1:
        return gradients[0]
    return join_gradients(*gradients) if len(gradients) == 2 else torch.cat(gradients)


class ItemCollection(ShardedEmbeddingCollection):
    """A sharded item table, which looks up the rows of all attributes with each batch."""

    def __init__(self, module: ItemTable, *args: Any, **given: Any) -> None:
        super().__init__(module, *args, **given)
        self.attributes = module.attributes

    def features(self, batch: Lookup) -> KeyedJaggedTensor:
        """The ids of a batch and of all attributes."""
        return with_attributes(batch.features, self.attributes)


class ExchangedCollection(ItemCollection):
    """TorchRec's sharded collection, called with a batch."""

    def input_dist(self, ctx: Any, batch: Lookup) -> Any:
        """TorchRec's all-to-all of the batch's ids."""
        return super().input_dist(ctx, self.features(batch))


class LocalCollection(ItemCollection):
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
        ctx.batch, ctx.request = batch, self.features(batch)
        return requested(ctx)

    def compute_and_output_dist(
        self, ctx: LookupContext, features: list[KeyedJaggedTensor]
    ) -> dict[str, JaggedTensor]:
        """Rows [T, D], [C, D] and [A, D] of the features."""
        (ids,) = features
        assert ids.keys() == self._names, (ids.keys(), self._names)
        (lookup,) = upstream.lookups(self)
        rows = lookup(ids).view(-1, self._width)
        return with_lengths(ids, _Split.apply(rows, ids.length_per_key()))


class RequestingCollection(ItemCollection):
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
        self._more_slots = (
            0 if self.attributes is None else exchange.most_in_a_shard(self.attributes)
        )
        upstream.set_input_dist_ready(self, True)

    def create_context(self) -> LookupContext:
        """The context of a batch."""
        return LookupContext()

    def request(self, batch: PackedBatch) -> Any:
        """What the exchange does a batch ahead."""
        ids = batch.requested
        if self.attributes is None:
            return self.exchange.request(ids, batch.slots)
        ids = torch.cat([ids, ids_of(self.attributes, ids.device)])
        return self.exchange.request(ids, batch.slots + self._more_slots)

    def input_dist(self, ctx: LookupContext, batch: PackedBatch) -> KJTListSplitsAwaitable:
        """Request the rows of a batch."""
        ctx.batch, ctx.request = batch, self.request(batch)
        return requested(ctx)

    def compute_and_output_dist(
        self, ctx: LookupContext, requests: list[Any]
    ) -> dict[str, JaggedTensor]:
        """Rows [T, D], [C, D] and [A, D] of the features of the batch and of all attributes."""
        features = self.features(ctx.batch)
        num_items, count, *_ = sizes = features.length_per_key()
        candidates = None
        if not self._draws:
            candidates = features.values()[num_items : num_items + count]
            sizes = [num_items, *sizes[2:]]
        return with_lengths(features, self.look_up(requests[0], sizes, candidates))

    def look_up(
        self, request: Any, sizes: list[int], candidates: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Rows of items, candidates and, if there are any, attributes.

        Args:
            sizes: numbers of requested items, candidates and attributes.
            candidates: int64 [C], items of this shard, which are not requested; None: they are.
        """
        raise NotImplementedError(type(self))

    def forward(self, batch: Any) -> dict[str, JaggedTensor]:
        """The same, a batch not ahead; in an evaluation by TorchRec."""
        if self.training:
            return super().forward(batch)
        stock, ctx = ShardedEmbeddingCollection, super().create_context()
        upstream.set_input_dist_ready(self, self._was_evaluated)
        self._was_evaluated = True
        features = stock.input_dist(self, ctx, self.features(batch)).wait().wait()
        return stock.compute_and_output_dist(self, ctx, features)


class FbgemmItemTable(RequestingCollection):
    """Looked up and updated by FBGEMM, for several ranks; not for Adam.

    Empty slots look up row 0 and give it a gradient of zero, by which Adam would move it.
    """

    def look_up(
        self, request: Any, sizes: list[int], candidates: Tensor | None
    ) -> tuple[Tensor, ...]:
        local = self.exchange.local_ids(request)
        is_here = local >= 0
        if candidates is not None:
            local = torch.cat([local, candidates - self.exchange.low])
        (lookup,) = upstream.lookups(self)
        none = jagged_items(local[:0], torch.zeros(1, dtype=torch.int64, device=local.device))
        # All are looked up as candidates.
        ids = with_candidates(none, local.clamp(min=0))
        ids = with_attributes(ids, None if self.attributes is None else (0, 0))
        rows = lookup(ids).view(-1, upstream.width(self))
        rows = _Divided.apply(rows, self.exchange.world_size)  # as TorchRec's exchange does
        here = torch.where(is_here[:, None], rows[: len(is_here)], 0.0)
        own = _OwnRows.apply(here, self.exchange, request)
        items, *others = own.split(sizes)
        return items, *([] if candidates is None else [rows[len(is_here) :]]), *others


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
        return ctx.exchange.all_gradients(gradient.contiguous(), ctx.request), None, None


class _Split(torch.autograd.Function):
    """Rows of all features; gradients of two are joined without copying a large catalog's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return rows.split(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, items: Tensor, *others: Tensor) -> tuple[Tensor, None]:
        return joined([items, *(each for each in others if len(each))]), None
