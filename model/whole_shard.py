"""A shard of the item table all of whose rows take part in a step: scored and updated in place.

The exact softmax scores every item, so every row of a rank's shard gets a gradient in every step.

    FBGEMM's lookup     sorts the ids of all rows, copies these, updates them one by one
    ``WholeShard``      looks up the histories' items alone; the candidates are the table itself; in
                        the backward pass the items' gradients are added to the candidates', and
                        one pass over the shard updates it

Weights, optimizer state, learning rate and step count stay FBGEMM's, so that TorchRec shards,
saves and restores them as before.

Shapes: T items whose rows are looked up, R rows of the shard, C candidates, D width.
"""

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from model.head import CatalogSlice, HeadConfig
from model.kernels.row_sums import add_rows
from model.kernels.table_update import UPDATES, Step, update
from model.plan import ShardingConfig, embedding_optimizer
from model.ranks import Ranks

# A catalog of fewer items than a step has positions is cheap to copy and to sort, while one row,
# the mask token's, has thousands of gradients to add up.
ITEMS_A_POSITION = 1


def scores_in_place(
    config: ShardingConfig, head: HeadConfig, num_items: int, positions: int, ranks: Ranks
) -> bool:
    """Whether every rank scores the rows of its own shard, all of them, in every step.

    Args:
        positions: of a rank's training batch, at most.
    """
    block = -(-(num_items + 2) // ranks.world_size)
    return (
        config.mode == "dmp"
        and num_items >= ITEMS_A_POSITION * positions
        and (ranks.world_size == 1 or config.sharding == "row_wise")
        and block * (ranks.world_size - 1) < num_items + 2  # no rank without rows
        and (head.head, head.loss) == ("tied", "softmax")
        and (config.table_precision, config.compute_kernel) == ("fp32", "fused")
        and embedding_optimizer(config, ranks.device) in UPDATES
    )


class WholeShard:
    """Looks up rows for TorchRec, hands out the candidates, updates the table.

    Args:
        table: FBGEMM's, of one table with rows in float32.
        optimizer: its fused optimizer.
        catalog: the items that this rank scores.
        first: the shard's row of ``catalog.low``.
        world_size: TorchRec divides the gradients of looked-up rows by it, and means those of the
            candidates to be divided likewise.
    """

    def __init__(
        self,
        table: SplitTableBatchedEmbeddingBagsCodegen,
        optimizer: str,
        catalog: CatalogSlice,
        first: int,
        world_size: int,
    ) -> None:
        (self._rows,) = table.split_embedding_weights()
        self._states = next(iter(table.split_optimizer_states()), ())
        self._table, self._optimizer = table, optimizer
        self._first, self._world_size = first, world_size
        self._in_place = self._rows[first : first + catalog.high - catalog.low]
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

    def update(
        self, ids: torch.Tensor, of_items: torch.Tensor | None, gradient: torch.Tensor | None
    ) -> None:
        """One step of the optimizer; gradients [T, D] of ``ids`` [T], and [C, D] of candidates."""
        count = len(self._in_place)
        if gradient is None:
            gradient = torch.zeros_like(self._in_place)
        gradient = gradient.contiguous()
        outer = gradient.new_zeros(len(self._rows) - count, gradient.shape[1])
        if of_items is not None:
            if self._world_size > 1:
                of_items = of_items * self._world_size
            # Rows before the candidates come after those behind them.
            index = (ids - self._first).remainder_(len(self._rows))
            add_rows(gradient, index, of_items, outer)
        known = self._table.optimizer_args
        step = Step(
            lr=self._table.get_learning_rate(),
            beta1=known.beta1,
            beta2=known.beta2,
            eps=known.eps,
            number=int(self._table.iter_cpu.add_(1)),
            scale=1 / self._world_size,
        )
        update(self._optimizer, self._rows, self._states, gradient, outer, self._first, step)


def score_in_place(
    model: nn.Module, catalog: CatalogSlice, optimizer: str, ranks: Ranks
) -> WholeShard:
    """Let the one sharded collection of ``model`` look up through a :class:`WholeShard`."""
    (collection,) = (m for m in model.modules() if isinstance(m, ShardedEmbeddingCollection))
    (lookup,) = collection._lookups
    (kernel,) = lookup._emb_modules
    # Only rank 0 has the padding row, which is not scored.
    first = 1 if ranks.rank == 0 else 0
    shard = WholeShard(kernel.emb_module, optimizer, catalog, first, ranks.world_size)
    lookup.forward = shard
    return shard


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, reason: torch.Tensor, shard: WholeShard, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        return shard._rows.index_select(0, ids), shard._in_place.detach()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_items: torch.Tensor | None, gradient: torch.Tensor | None
    ) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        ctx.shard.update(ids, of_items, gradient)
        return None, None, None
