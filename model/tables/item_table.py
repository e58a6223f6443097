"""The item table, and a linear head's table, looked up and updated by this project's code.

They are float32 or fp16. The backward pass of the lookup sums the gradients of equal ids and
updates their rows. With the exact softmax every row gets a gradient in every step. In place, the
candidates are the shard itself: only the items of the histories are looked up, their gradients are
added to those of the candidates, and one pass over the shard updates it.

TorchRec's train pipeline calls ``input_dist`` a batch ahead (it requests rows, ``all_to_all.py``)
and ``compute_and_output_dist`` in the step, which a CUDA graph may hold. FBGEMM keeps weights,
optimizer state, learning rate and step count, so that TorchRec shards, saves and restores the table
like any other. Evaluation on several ranks uses TorchRec's lookup and exchange.

Shapes: T items of the batch, C candidates, A attributes, U rows looked up for all ranks, R rows of
the shard, D width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embedding_sharding import KJTListSplitsAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor

from model.execution import ExecutionPlan
from model.kernels import side_stream
from model.kernels.segment_sum import SortedIndex, add_rows, joined, sort_index
from model.network.head import CatalogSlice
from model.tables import upstream
from model.tables.collections import ItemCollection, LookupContext, requested, with_lengths
from model.tables.row_exchange import RowExchange
from model.tables.row_lookup import rows_or_zeros
from model.tables.table_update import Step, StepOnDevice, update, update_some
from pipeline.batches.features import items_of
from pipeline.batches.train_batch import PackedBatch


class TableShard:
    """Looks up and updates this rank's rows of one table.

    Args:
        tables: FBGEMM's module of one or more tables with float32 or fp16 rows.
        scored: the items that this rank scores in place; None: candidates are looked up.
        place: of the table in ``tables``.
        on_device: the values of a step that kernels read; None: each update writes them.
    """

    def __init__(
        self,
        tables: Any,
        optimizer: str,
        exchange: RowExchange,
        scored: CatalogSlice | None = None,
        place: int = 0,
        on_device: StepOnDevice | None = None,
    ) -> None:
        self.rows = tables.split_embedding_weights()[place]
        self.exchange = exchange
        self._states = next(iter(tables.split_optimizer_states()[place:]), ())
        self._optimizer, self._on_device = optimizer, on_device
        self._first_row = place * exchange.num_rows + exchange.low  # different in all tables
        # Autograd calls a backward pass only where an input requires gradients; ids do not.
        self._trigger = torch.zeros((), device=self.rows.device, requires_grad=True)
        self._first = 0
        self._step: Step | None = None  # that of :meth:`begin_step`
        self.in_place: Tensor | None = None
        if scored is not None:
            # A shard behind the items has attributes alone.
            self._first = max(0, scored.low - exchange.low)
            self.in_place = self.rows[self._first :][: scored.high - scored.low]

    def look_up(
        self, request: Any, num_items: int, candidates: Tensor | None, num_attributes: int = 0
    ) -> tuple[Tensor, ...]:
        """Rows of items [T, D], of candidates [C, D] and of any attributes [A, D], float32.

        When trained in place, there are no candidates: they are the shard's items. The backward
        pass sends the gradients and updates the rows, on the side stream if one is open: the caller
        of ``running_on`` averages the encoder's gradients by another communicator.

        Args:
            request: of the exchange, for the ids of items, of drawn candidates and of attributes;
                None: no rows are exchanged.
            candidates: ids of this shard, int64 [C]; None: they are drawn.
        """
        return _LookUp.apply(self._trigger, self, request, num_items, candidates, num_attributes)

    def begin_step(self, step: Step) -> None:
        """Update by ``step`` from now on."""
        self._step = replace(step, first_row=self._first_row)

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
        self,
        index: SortedIndex,
        of_rows: Sequence[Tensor],
        of_candidates: Tensor | None = None,
    ) -> None:
        """Do one step of the optimizer.

        ``of_rows`` are gradients of the rows looked up, one or two tensors of [U, D] together,
        ``of_candidates`` [C, D] those of the candidates in place.
        """
        assert self._step is not None
        known = self._optimizer, self.rows, self._states
        if self.in_place is None:
            update_some(*known, index, of_rows, self._step, self._on_device)
            return
        assert of_candidates is not None
        (of_items,) = of_rows
        gradient = of_candidates.contiguous()
        outer = gradient.new_zeros(len(self.rows) - len(gradient), gradient.shape[1])
        add_rows(gradient, index, of_items, outer)
        update(*known, gradient, outer, self._first, self._step, self._on_device)


def look_up_all(
    shards: Sequence[TableShard],
    requests: Sequence[Any],
    num_items: int,
    candidates: Tensor | None,
    num_attributes: int = 0,
) -> tuple[Tensor, ...]:
    """Rows [T, D], [C, D] and any [A, D] of :meth:`TableShard.look_up`, of one table or one each.

    Without ``candidates`` they are drawn: the ids after ``num_items`` of the only request, or those
    of the second one. The last ids are those of the attributes.
    """
    if len(shards) == 1:
        return shards[0].look_up(requests[0], num_items, candidates, num_attributes)
    items, _ = shards[0].look_up(requests[0], num_items, None)
    request = requests[1] if candidates is None else None
    return items, shards[1].look_up(request, 0, candidates)[1]


def exchanged_ids(
    batch: PackedBatch, of_two_tables: bool, attributes: Tensor | None
) -> list[Tensor]:
    """The ids, int64 [.], whose rows are exchanged, for each table of which rows are exchanged.

    Args:
        of_two_tables: items are rows of one table, drawn candidates of another.
        attributes: ids of all attributes, int64 [A], rows of the only table; None: there are none.
    """
    assert attributes is None or not of_two_tables
    if of_two_tables:
        return [*batch.requested.tensor_split([batch.num_items])]
    return [batch.requested if attributes is None else torch.cat([batch.requested, attributes])]


class ShardedItemTable(ItemCollection):
    """A sharded collection, each of its tables trained through a :class:`TableShard`.

    With a tied head items and candidates are rows of one table, else of one each.

    Args:
        draws_candidates: candidates are any items, exchanged like histories; else this shard's.

    Attributes:
        step_on_device: the values of a step that kernels read; :meth:`begin_step` writes them.
        encoder_lr: learning rate of the encoder in the next step, which is one of them.
    """

    def __init__(
        self,
        *args: Any,
        plan: ExecutionPlan,
        exchange: RowExchange,
        catalog: CatalogSlice,
        draws_candidates: bool,
        **given: Any,
    ) -> None:
        super().__init__(*args, **given)
        self.exchange, self._draws = exchange, draws_candidates
        self._more_slots = exchange.most_in_a_shard(self.attributes) if self.attributes else 0
        self._was_evaluated = False
        upstream.set_input_dist_ready(self, True)
        tables = upstream.fbgemm_tables(self)
        names = upstream.table_names(self)
        assert names in (["item"], ["item", "output"]), names
        self._is_tied = len(names) == 1

        # In device memory: one CUDA graph serves steps of different rates.
        self.step_on_device = StepOnDevice(tables.split_embedding_weights()[0].device)
        self._optimizer, self.encoder_lr = plan.table_optimizer, 0.0

        def shard(place: int, scores: bool) -> TableShard:
            scored = catalog if plan.in_place and scores else None
            known = tables, plan.table_optimizer, exchange, scored, place
            return TableShard(*known, self.step_on_device)

        self.shards = [shard(0, self._is_tied)]
        if not self._is_tied:
            self.shards.append(shard(1, True))
        # The mean over ranks, as in TorchRec.
        self._next_step = partial(Step.counted, tables, 1 / exchange.world_size)

    def begin_step(self) -> None:
        """Count a step and write its values: the current learning rates, the key of its bits."""
        step = self._next_step()
        for shard in self.shards:
            shard.begin_step(step)
        self.step_on_device.write(self._optimizer, step, self.encoder_lr)

    def create_context(self) -> LookupContext:
        """The context of a batch."""
        return LookupContext()

    def requests(self, batch: PackedBatch) -> list[Any]:
        """What the exchange does a batch ahead, for each table of which rows are exchanged.

        A step's slots suffice for all of its ids together, so for those of each table.
        """
        slots, added = batch.slots + self._more_slots, None
        if self.attributes is not None:
            added = items_of(self.attributes, batch.requested.device)
        ids = exchanged_ids(batch, self._draws and not self._is_tied, added)
        return [self.exchange.request(each, slots) for each in ids]

    def input_dist(self, ctx: LookupContext, batch: PackedBatch) -> KJTListSplitsAwaitable:
        """Request the rows of a batch."""
        ctx.batch, ctx.requests = batch, self.requests(batch)
        return requested(ctx)

    def compute_and_output_dist(
        self, ctx: LookupContext, requests: list[Any]
    ) -> dict[str, JaggedTensor]:
        """Rows [T, D], [C, D] and [A, D] of the features of the batch and of all attributes.

        When trained in place, there are no candidates: they are the shard's items.
        """
        self.begin_step()
        return with_lengths(self.features(ctx.batch), self.rows(ctx.batch, requests))

    def rows(self, batch: PackedBatch, requests: Sequence[Any]) -> tuple[Tensor, ...]:
        """The same without lengths, in a step that was begun."""
        candidates = None
        if not self._draws:
            assert batch.candidate_range is not None
            candidates = items_of(batch.candidate_range, batch.requested.device)
        sizes = batch.num_items, candidates, self.num_attributes
        return look_up_all(self.shards, requests, *sizes)

    def forward(self, batch: Any) -> dict[str, JaggedTensor]:
        """The same, a batch not ahead; in an evaluation on several ranks by TorchRec."""
        if self.training:
            return super().forward(batch)
        features = self.features(batch)
        if self.exchange.world_size == 1:
            ids = features.values().split(features.length_per_key())
            tables = [self.shards[0].rows, self.shards[-1].rows]
            if self.attributes is not None:
                tables.append(self.shards[0].rows)
            rows = tuple(rows_or_zeros(t, i) for t, i in zip(tables, ids, strict=True))
            return with_lengths(features, rows)
        stock, ctx = ShardedEmbeddingCollection, super().create_context()
        upstream.set_input_dist_ready(self, self._was_evaluated)
        self._was_evaluated = True
        ids = stock.input_dist(self, ctx, features).wait().wait()
        return stock.compute_and_output_dist(self, ctx, ids)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        trigger: Tensor,
        shard: TableShard,
        request: Any,
        num_items: int,
        candidates: Tensor | None,
        num_attributes: int,
    ) -> tuple[Tensor, ...]:
        """Rows of the first ``num_items`` requested ids, of the candidates, and of attributes.

        Args:
            request: of the exchange; None: no rows are exchanged.
            candidates: rows of this shard to score; None: requested, too, after the items.
            num_attributes: of the last requested ids; 0: only two tensors are returned.
        """
        exchange = shard.exchange
        if request is None:
            assert candidates is not None
            local = candidates[:0]
        else:
            local = exchange.local_ids(request)
        count = len(local)
        if candidates is not None and len(candidates):
            local = torch.cat([local, candidates - exchange.low])
        ctx.shard, ctx.request, ctx.draws = shard, request, candidates is None
        ctx.index = side_stream.start(lambda: shard.index(local))
        # Rows that are sent are converted by the rank that receives them.
        sent = torch.float32 if request is None or exchange.world_size == 1 else shard.rows.dtype
        rows = rows_or_zeros(shard.rows, local, sent)
        own = rows[:0] if request is None else exchange.own_rows(rows[:count], request)
        added = []
        if num_attributes:
            own, *added = own.split([len(own) - num_attributes, num_attributes])
        if shard.in_place is not None:
            # A gradient has its value's dtype: fp16 rows are converted.
            return own, shard.in_place.detach().float(), *added
        scored = own[num_items:] if candidates is None else rows[count:].float()
        return own[:num_items], scored, *added

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_items: Tensor, of_candidates: Tensor, *of_added: Tensor
    ) -> tuple[None, ...]:
        shard: TableShard = ctx.shard

        def exchanged(*gradients: Tensor) -> Sequence[Tensor]:
            if ctx.request is None:
                return gradients
            return shard.exchange.all_gradients(gradients, ctx.request)

        def work() -> None:
            index = ctx.index.result()
            if ctx.draws:
                shard.update(index, exchanged(of_items, joined([of_candidates, *of_added])))
            elif shard.in_place is None:
                first, *others = exchanged(of_items, *of_added)
                shard.update(index, [first, joined([*others, of_candidates])])
            else:
                shard.update(index, exchanged(joined([of_items, *of_added])), of_candidates)

        # The gradients of candidates, which the head used, are computed before those of items, and
        # those of attributes are sums over both.
        last = of_items if len(of_items) else of_candidates
        side_stream.run(work, of_added[0] if of_added else last)
        return (None,) * 6
