"""The item table, one float32 table looked up and updated by this project's code.

The backward pass of the lookup sums the gradients of equal ids and updates their rows. With the
exact softmax every row gets a gradient in every step. In place, the candidates are the shard
itself: only the items of the histories are looked up, their gradients are added to those of the
candidates, and one pass over the shard updates it.

TorchRec's train pipeline calls ``input_dist`` a batch ahead (it requests rows, ``all_to_all.py``)
and ``compute_and_output_dist`` in the step, which a CUDA graph may hold. FBGEMM keeps weights,
optimizer state, learning rate and step count, so that TorchRec shards, saves and restores the table
like any other. Evaluation on several ranks uses TorchRec's lookup and exchange.

Shapes: T items of the batch, C candidates, A attributes, U rows looked up for all ranks, R rows of
the shard, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.sparse.jagged_tensor import JaggedTensor

from model.execution import ExecutionPlan
from model.kernels import side_stream
from model.kernels.l2_normalize import join_gradients
from model.kernels.segment_sum import SortedIndex, add_rows, sort_index
from model.kernels.side_stream import Pending
from model.network.head import CatalogSlice
from model.tables import upstream
from model.tables.collections import RequestingCollection, joined, with_lengths
from model.tables.row_exchange import RowExchange
from model.tables.row_lookup import rows_or_zeros
from model.tables.table_update import Step, has_adam_kernels, update, update_some
from pipeline.batches.features import Lookup


class TableShard:
    """Looks up and updates this rank's rows.

    Args:
        table: FBGEMM's module of one table with float32 rows.
        scored: the items that this rank scores in place; None: candidates are looked up.
    """

    def __init__(
        self, table: Any, optimizer: str, exchange: RowExchange, scored: CatalogSlice | None = None
    ) -> None:
        (self.rows,) = table.split_embedding_weights()
        self.exchange = exchange
        self._states = next(iter(table.split_optimizer_states()), ())
        self._table, self._optimizer = table, optimizer
        # Autograd calls a backward pass only where an input requires gradients; ids do not.
        self._trigger = torch.zeros((), device=self.rows.device, requires_grad=True)
        self._first = 0
        self.in_place: Tensor | None = None
        if scored is not None:
            self._first = scored.low - exchange.low
            self.in_place = self.rows[self._first :][: scored.high - scored.low]
        # Adam's kernels read their rates from the device, so that one graph serves many steps.
        self._rates: Tensor | None = None
        if optimizer == "adam" and has_adam_kernels(self.rows):
            self._rates = torch.zeros(2, device=self.rows.device)

    def look_up(
        self, request: Any, sizes: list[int], candidates: Tensor | None
    ) -> tuple[Tensor, ...]:
        """As of :class:`RequestingCollection`; the backward pass updates the rows."""
        return _LookUp.apply(self._trigger, self, request, sizes, candidates)

    def begin_step(self) -> None:
        """Count a step and read the table's current learning rate."""
        # The mean over ranks, as in TorchRec.
        self._step = Step.counted(self._table, scale=1 / self.exchange.world_size)
        if self._rates is not None:
            for place, rate in zip(self._rates.unbind(), self._step.rates, strict=True):
                place.fill_(rate)

    def index(self, ids: Tensor) -> SortedIndex:
        """The row that the gradient of each local id [U] is added to; R (ignored) for -1.

        In place, the order is: candidates, rows after them, rows before them.
        """
        count, index = len(self.rows), ids
        if self.in_place is not None:
            index = (ids - self._first).remainder_(count)
        if self.exchange.world_size > 1:
            index = index.masked_fill(ids < 0, count)
        return sort_index(index, count)

    def update(
        self, index: Pending[SortedIndex], of_rows: Tensor, of_candidates: Tensor | None = None
    ) -> None:
        """Do one step of the optimizer, on the side stream if one is open.

        ``of_rows`` [U, D] are gradients of the rows looked up, ``of_candidates`` [C, D] those of
        the candidates in place.
        """
        # A captured step is replayed many times; each replay is counted by its caller.
        if not (self._rates is not None and torch.cuda.is_current_stream_capturing()):
            self.begin_step()

        def work() -> None:
            known = self._optimizer, self.rows, self._states
            if self.in_place is None:
                update_some(*known, index.result(), of_rows, self._step, self._rates)
                return
            assert of_candidates is not None
            gradient = of_candidates.contiguous()
            outer = gradient.new_zeros(len(self.rows) - len(gradient), gradient.shape[1])
            add_rows(gradient, index.result(), of_rows, outer)
            update(*known, gradient, outer, self._first, self._step, self._rates)

        side_stream.run(work)


class ShardedItemTable(RequestingCollection):
    """A sharded collection of one table, trained through a :class:`TableShard`."""

    def __init__(
        self,
        *args: Any,
        plan: ExecutionPlan,
        exchange: RowExchange,
        catalog: CatalogSlice,
        **given: Any,
    ) -> None:
        super().__init__(*args, exchange=exchange, **given)
        scored = catalog if plan.in_place else None
        table = upstream.fbgemm_table(self)
        self.shard = TableShard(table, plan.table_optimizer, exchange, scored)

    def look_up(
        self, request: Any, sizes: list[int], candidates: Tensor | None
    ) -> tuple[Tensor, ...]:
        """When trained in place, there are no candidates: they are the shard's items."""
        return self.shard.look_up(request, sizes, candidates)

    def forward(self, batch: Lookup) -> dict[str, JaggedTensor]:
        """In an evaluation on one rank without exchange."""
        if self.training or self.exchange.world_size > 1:
            return super().forward(batch)
        features = self.features(batch)
        rows = rows_or_zeros(self.shard.rows, features.values())
        return with_lengths(features, rows.split(features.length_per_key()))


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        trigger: Tensor,
        shard: TableShard,
        request: Any,
        sizes: list[int],
        candidates: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Rows of items, candidates and attributes.

        Args:
            sizes: of the requested rows of each.
            candidates: rows of this shard to score; None: they are requested.
        """
        exchange = shard.exchange
        local = exchange.local_ids(request)
        count = len(local)
        if candidates is not None and len(candidates):
            local = torch.cat([local, candidates - exchange.low])
        ctx.shard, ctx.request, ctx.draws = shard, request, candidates is None
        ctx.index = side_stream.start(lambda: shard.index(local))
        rows = rows_or_zeros(shard.rows, local)
        own = exchange.own_rows(rows[:count], request)
        items, *others = own.split(sizes)
        if shard.in_place is not None:
            return items, shard.in_place.detach(), *others
        return items, *([] if candidates is None else [rows[count:]]), *others

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_items: Tensor, of_candidates: Tensor, *of_attributes: Tensor
    ) -> tuple[None, ...]:
        shard: TableShard = ctx.shard

        def exchanged(gradient: Tensor) -> Tensor:
            return shard.exchange.all_gradients(gradient, ctx.request)

        if ctx.draws:
            of_rows = exchanged(joined([of_items, of_candidates, *of_attributes]))
            shard.update(ctx.index, of_rows)
            return (None,) * 5
        of_rows = exchanged(joined([of_items, *of_attributes]))
        if shard.in_place is None:
            shard.update(ctx.index, join_gradients(of_rows, of_candidates))
        else:
            shard.update(ctx.index, of_rows, of_candidates)
        return (None,) * 5
