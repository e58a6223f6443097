"""What sharded item tables share, and those that FBGEMM looks up.

TorchRec's train pipeline calls ``input_dist`` of a sharded module with the module's arguments, here
the batch, one batch ahead, and ``compute_and_output_dist`` in the step.

Shapes: T items and C candidates of the batch, A attributes, D width.
"""

from dataclasses import dataclass, field
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
from model.kernels.segment_sum import joined
from model.tables import upstream
from pipeline.batches.features import Lookup, with_attributes


@dataclass
class LookupContext(Multistreamable):
    """The batch that is looked up, and what was requested for it."""

    batch: Any = None
    requests: list[Any] = field(default_factory=list)

    def record_stream(self, stream: torch.Stream) -> None:
        """The pipeline keeps the batch's memory."""


def requested(ctx: LookupContext) -> KJTListSplitsAwaitable:
    """The result of ``input_dist`` where no host waits: ``ctx.requests`` after two waits."""
    return KJTListSplitsAwaitable([NoWait(NoWait(one)) for one in ctx.requests], ctx)


def with_lengths(features: KeyedJaggedTensor, rows: tuple[Tensor, ...]) -> dict[str, JaggedTensor]:
    """The rows of each feature, with its lengths."""
    lengths = features.lengths().view(len(rows), -1).unbind()
    return {
        name: JaggedTensor(of_name, lengths=each)
        for name, of_name, each in zip(features.keys(), rows, lengths, strict=True)
    }


class ItemCollection(ShardedEmbeddingCollection):
    """A sharded item table, which looks up the rows of all attributes with each batch."""

    def __init__(self, module: ItemTable, *args: Any, **given: Any) -> None:
        super().__init__(module, *args, **given)
        self.attributes, self.num_attributes = module.attributes, module.num_attributes

    def features(self, batch: Lookup) -> KeyedJaggedTensor:
        """The ids of a batch and of all attributes."""
        return with_attributes(batch.features, self.attributes)


class ExchangedCollection(ItemCollection):
    """TorchRec's sharded collection, called with a batch."""

    def input_dist(self, ctx: Any, batch: Lookup) -> Any:
        """TorchRec's all-to-all of the ids."""
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
        ctx.batch, ctx.requests = batch, [self.features(batch)]
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


class _Split(torch.autograd.Function):
    """Rows of all features; gradients of two are joined without copying a large catalog's."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> tuple[Tensor, ...]:
        return rows.split(sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, items: Tensor, *others: Tensor) -> tuple[Tensor, None]:
        return join_gradients(items, joined(others)), None
