"""Rows of a row-wise sharded table for all ranks at once: every size is known beforehand.

    ids of this rank [n]          --all-gather-->      ids of all ranks [U]      a batch ahead
    rows of this shard [U, D], zeros for ids of other shards
                                  --reduce-scatter-->  rows of this rank [n, D]
    backward: gradients [n, D]    --all-gather-->      [U, D], of which those of the shard update it

TorchRec sends each id to the rank that has its row, and the row back, when all ranks have told each
other how many there are: the fewest bytes, by many calls, between which hosts wait. Here sizes are
those of the batches, on which the ranks' loaders agree (``agreement``), so that from the rows on a
step is one CUDA graph, as on one rank. W times as many bytes are sent, which is little between the
GPUs of a host.

Shapes: W ranks, n ids of a rank, U = W n, D width, R rows of the shard.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from model.distributed import Ranks, narrow_group
from model.tables.lone_rank import Home
from pipeline.batches.batch import TrainBatch, jagged_items, with_candidates
from pipeline.training.to_tensors import Step


def agreement(ranks: Ranks) -> Callable[[np.ndarray], np.ndarray]:
    """The largest of each integer on all ranks, for a thread beside training, between hosts."""
    group = dist.new_group(backend="gloo", timeout=ranks.timeout)

    def largest(sizes: np.ndarray) -> np.ndarray:
        agreed = torch.from_numpy(sizes.astype(np.int64))
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
        return agreed.numpy()

    return largest


class GatheredRows:
    """The exchange of one collection's rows during training; evaluation is left to TorchRec.

    Args:
        collection: sharded row-wise, of one table, whose lookup gives zeros for -1.
        num_rows: of the whole table.
    """

    def __init__(self, collection: ShardedEmbeddingCollection, num_rows: int, ranks: Ranks) -> None:
        self._world_size = ranks.world_size
        block = -(-num_rows // ranks.world_size)
        self._low = ranks.rank * block
        self._rows = min(block, num_rows - self._low)
        # Its own, so that it need not wait for what a step exchanges meanwhile.
        self._group = narrow_group(ranks)
        self._layouts: dict[tuple[int, tuple[int, int]], KeyedJaggedTensor] = {}
        (lookup,) = collection._lookups
        (names,) = collection._embedding_names_per_sharding
        home = Home(lookup, names, collection._embedding_dim)
        at_large = collection.forward
        collection.forward = lambda *given: (home if collection.training else at_large)(*given)

    def gather(self, batch: Step) -> None:
        """Tell the batch the ids of all ranks; every rank must call it, of as many ids.

        Drawn candidates are ids like the items; those of a range, which are rows of this shard,
        are the rank's own.
        """
        own = batch.drawn_ids
        batch.everyone = own.new_empty(self._world_size * len(own))
        dist.all_gather_into_tensor(batch.everyone, own, group=self._group)

    def distribute(self, batch: TrainBatch) -> None:
        """Let the batch look up the ids of all ranks, which it has been told."""
        assert batch.everyone is not None
        candidates = 0, 0
        if batch.negatives is None:
            low, high = batch.candidate_range
            candidates = (low - self._low, high - self._low) if high > low else candidates
        local = batch.everyone - self._low
        local.masked_fill_((local < 0) | (local >= self._rows), -1)
        batch.look_up_for_all(self._features(local, candidates))

    def collect(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's rows [n, D], of rows [U, D] that each rank has looked up for all."""
        return _Collect.apply(rows)

    def _features(self, local: torch.Tensor, candidates: tuple[int, int]) -> KeyedJaggedTensor:
        """Ids [U] as one row of items, and a range of candidates."""
        key = len(local), candidates
        if key not in self._layouts:
            lengths = torch.tensor([len(local)], device=local.device)
            self._layouts[key] = with_candidates(jagged_items(local, lengths), candidates)
        layout = self._layouts[key]
        items, scored = layout.length_per_key()
        if scored:
            local = torch.cat([local, layout.values()[items:]])
        return KeyedJaggedTensor(
            keys=layout.keys(),
            values=local,
            lengths=layout.lengths(),
            stride=layout.stride(),
            length_per_key=[items, scored],
        )


def gather_rows(model: nn.Module, num_rows: int, ranks: Ranks) -> GatheredRows:
    """Let the one sharded collection of ``model`` exchange by :class:`GatheredRows`.

    Their ids are gathered when the model is called with them, unless somebody has done it ahead.
    """
    (collection,) = (m for m in model.modules() if isinstance(m, ShardedEmbeddingCollection))
    exchange = GatheredRows(collection, num_rows, ranks)

    def before(module: nn.Module, given: tuple[TrainBatch]) -> None:
        (batch,) = given
        if not module.training or batch.is_for_all:
            return
        if batch.everyone is None:
            exchange.gather(batch)
        exchange.distribute(batch)

    model.register_forward_pre_hook(before)
    return exchange


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        own = rows.new_empty(len(rows) // dist.get_world_size(), rows.shape[1])
        dist.reduce_scatter_tensor(own, rows)
        return own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        # Whoever updates a shard leaves out the gradients of others' rows.
        everyone = gradient.new_empty(len(gradient) * dist.get_world_size(), gradient.shape[1])
        dist.all_gather_into_tensor(everyone, gradient.contiguous())
        return everyone
