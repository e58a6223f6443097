"""A shard of the item table, looked up and updated where it lies, in few calls.

    FBGEMM's lookup     sorts the ids of all rows that take part, copies these, updates them one by
                        one: for tables of any number, precision and place, by dozens of calls
    ``TableShard``      looks up rows of one table in float32; in the backward pass gradients of
                        equal ids are added up, and their rows updated

The exact softmax scores every item, so every row of the shard gets a gradient in every step. Of a
large catalog the candidates are then the table itself: only the histories' items are looked up,
their gradients are added to the candidates', and one pass over the shard updates it.

Weights, optimizer state, learning rate and step count stay FBGEMM's, so that TorchRec shards,
saves and restores them as before.

Shapes: T ids whose rows are looked up, R rows of the shard, C candidates, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from model.distributed import Ranks
from model.kernels import side_stream as aside
from model.kernels.segment_sum import SortedIndex, add_rows, sort_index
from model.kernels.side_stream import Ahead
from model.network.head import CatalogSlice, HeadConfig
from model.tables.row_lookup import rows_or_zeros
from model.tables.sharding_plan import ShardingConfig, embedding_optimizer
from model.tables.table_update import UPDATES, Step, update, update_some

# A catalog of fewer items than a step has positions is cheap to copy.
ITEMS_A_POSITION = 1
# Rows of all ranks, of which each gets its own: above this, fewer bytes are worth more calls.
GATHERED_BYTES = 256 << 20


@dataclass(frozen=True)
class Lookup:
    """How the rows of a training step come to where they are needed.

    Attributes:
        own: every rank looks up and updates its shard by a :class:`TableShard`.
        gathered: it does so for all ranks, as :mod:`model.tables.gathered_rows` says.
        in_place: the candidates are not looked up: they are the shard.
    """

    own: bool = False
    gathered: bool = False
    in_place: bool = False


def choose_lookup(
    config: ShardingConfig,
    head: HeadConfig,
    num_items: int,
    width: int,
    positions: int,
    drawn: int,
    ranks: Ranks,
) -> Lookup:
    """The way with the fewest calls that these tables allow.

    Args:
        width: D.
        positions: of a rank's training batch, at most.
        drawn: items that a rank scores in a step besides, at most.
    """
    block = -(-(num_items + 2) // ranks.world_size)
    several = ranks.world_size > 1
    own = (
        (config.mode, config.table_precision, config.compute_kernel) == ("dmp", "fp32", "fused")
        and head.head == "tied"
        and embedding_optimizer(config, ranks.device) in UPDATES
    )
    if several:
        sent = 4 * width * (positions + drawn) * ranks.world_size
        no_rank_without_rows = block * (ranks.world_size - 1) < num_items + 2
        own = (
            own
            and config.sharding == "row_wise"
            and sent <= GATHERED_BYTES
            and no_rank_without_rows
        )
    large = num_items >= ITEMS_A_POSITION * positions
    return Lookup(own, own and several, own and large and head.loss == "softmax")


class TableShard:
    """Looks up rows for TorchRec, hands out the candidates, updates the table.

    Args:
        table: FBGEMM's, of one table with rows in float32.
        optimizer: its fused optimizer.
        catalog: the items that this rank scores in place; None: candidates are looked up.
        first: the shard's row of ``catalog.low``.
        world_size: gradients are divided by it, as TorchRec means it; if there are several ranks,
            ids may be -1: of rows of others, to be given zeros and no gradients.
    """

    def __init__(
        self,
        table: SplitTableBatchedEmbeddingBagsCodegen,
        optimizer: str,
        catalog: CatalogSlice | None,
        first: int,
        world_size: int,
    ) -> None:
        (self._rows,) = table.split_embedding_weights()
        self._states = next(iter(table.split_optimizer_states()), ())
        self._table, self._optimizer = table, optimizer
        self._first, self._world_size = first, world_size
        self._in_place: torch.Tensor | None = None
        if catalog is not None:
            self._in_place = self._rows[first : first + catalog.high - catalog.low]
        # Adam's kernels read its rates from the device, so that a graph can be of many steps.
        self._rates: torch.Tensor | None = None
        self._places: tuple[torch.Tensor, ...] = ()
        if optimizer == "adam":
            self._rates = torch.zeros(2, device=self._rows.device)
            self._places = self._rates.unbind()
        # Gives autograd a reason to come by.
        self._reason = torch.zeros((), device=self._rows.device, requires_grad=True)
        self._candidates: torch.Tensor | None = None

    def __call__(self, features: KeyedJaggedTensor) -> torch.Tensor:
        """Rows [T, D] of the features, whose ids are rows of the shard, in their order."""
        rows, self._candidates = _LookUp.apply(self._reason, self, features.values())
        return rows

    def candidates(self) -> torch.Tensor:
        """The candidates' rows [C, D], for the backward pass of the last lookup; to be had once."""
        candidates, self._candidates = self._candidates, None
        assert candidates is not None, "no lookup since"
        return candidates

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph may hold lookups and updates; ``count`` then precedes a replay."""
        return self._rates is not None

    def count(self) -> None:
        """One more step begins, of the learning rate that the table has now."""
        known = self._table.optimizer_args
        self._step = Step(
            lr=self._table.get_learning_rate(),
            beta1=known.beta1,
            beta2=known.beta2,
            eps=known.eps,
            number=int(self._table.iter_cpu.add_(1)),
            scale=1 / self._world_size,
        )
        for place, rate in zip(self._places, self._step.rates, strict=False):
            place.fill_(rate)

    def index(self, ids: torch.Tensor) -> SortedIndex:
        """Rows of the shard to which gradients of ``ids`` [T] go, R for -1: nowhere.

        Where candidates are scored in place they come first, rows before them after those behind.
        """
        table, index = self._rows, ids
        if self._in_place is not None:
            index = (ids - self._first).remainder_(len(table))
        if self._world_size > 1:
            index = index.masked_fill(ids < 0, len(table))
        return sort_index(index, len(table))

    def update(
        self,
        index: Ahead[SortedIndex],
        of_items: torch.Tensor | None,
        gradient: torch.Tensor | None,
    ) -> None:
        """One step of the optimizer, which ends before the next begins.

        Args:
            index: [T], as :meth:`index` says.
            of_items: [T, D], gradients of the index's rows.
            gradient: [C, D], of candidates in place.
        """
        # What is captured is of many steps, each of which is counted before its replay.
        if not self.is_capturable or not torch.cuda.is_current_stream_capturing():
            self.count()
        aside.leave(lambda: self._update(index, of_items, gradient))

    def _update(
        self,
        index: Ahead[SortedIndex],
        of_items: torch.Tensor | None,
        gradient: torch.Tensor | None,
    ) -> None:
        optimizer, table, states, step = self._optimizer, self._rows, self._states, self._step
        if self._in_place is None:
            if of_items is not None:
                update_some(optimizer, table, states, index.result(), of_items, step, self._rates)
            return
        count = len(self._in_place)
        if gradient is None:
            gradient = torch.zeros_like(self._in_place)
        gradient = gradient.contiguous()
        outer = gradient.new_zeros(len(table) - count, gradient.shape[1])
        if of_items is not None:
            add_rows(gradient, index.result(), of_items, outer)
        update(optimizer, table, states, gradient, outer, self._first, step, self._rates)


def own_shard(
    model: nn.Module, catalog: CatalogSlice | None, optimizer: str, ranks: Ranks
) -> TableShard:
    """Let the one sharded collection of ``model`` look up through a :class:`TableShard`."""
    (collection,) = (m for m in model.modules() if isinstance(m, ShardedEmbeddingCollection))
    (lookup,) = collection._lookups
    (kernel,) = lookup._emb_modules
    # Only rank 0 has the padding row, which is not scored.
    first = 1 if ranks.rank == 0 else 0
    shard = TableShard(kernel.emb_module, optimizer, catalog, first, ranks.world_size)
    lookup.forward = shard
    return shard


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reason: torch.Tensor, shard: TableShard, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.shard, ctx.index = shard, aside.begin(lambda: shard.index(ids))
        ctx.set_materialize_grads(False)
        scored = None if shard._in_place is None else shard._in_place.detach()
        return rows_or_zeros(shard._rows, ids), scored

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_items: torch.Tensor | None, gradient: torch.Tensor | None
    ) -> tuple[None, None, None]:
        ctx.shard.update(ctx.index, of_items, gradient)
        return None, None, None
