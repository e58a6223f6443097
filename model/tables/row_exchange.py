"""Exchange rows of a row-wise sharded table between all ranks, with sizes known in advance.

Gather, for few rows; a CUDA graph holds all of it:

    ids of this rank [n]          --all-gather-->      ids of all ranks [U = W n]
    rows of this shard [U, D], zeros for ids of other shards
                                  --reduce-scatter-->  rows of this rank [n, D]
    backward: gradients [n, D]    --all-gather-->      [U, D]; those of the shard's rows update it

All-to-all (``all_to_all.py``) sends each rank only the different rows that it needs. TorchRec's
sends a row for each id, and the hosts wait for sizes between its calls. Here the loaders agree on
sizes (:func:`all_sizes`), so that a CUDA graph can hold the exchange.

Shapes: W ranks, n ids of a rank, U rows looked up for all ranks, D width, R rows of the shard.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from model.distributed import Ranks
from model.kernels.segment_sum import joined
from model.network.head import shard_rows


class RowExchange:
    """The exchange of a rank with the table rows ``low`` ... ``low + rows - 1``, by gathering.

    The table of ``num_items`` items, padding, mask token and attributes is cut as TorchRec cuts it
    row-wise.
    """

    def __init__(self, num_items: int, ranks: Ranks, num_attributes: int = 0) -> None:
        self.world_size, self.num_rows = ranks.world_size, num_items + 2 + num_attributes
        self.block = shard_rows(num_items, ranks.world_size, num_attributes)
        self.low = min(ranks.rank * self.block, self.num_rows)
        self.rows = min(self.block, self.num_rows - self.low)

    def most_in_a_shard(self, rows: tuple[int, int]) -> int:
        """The most rows of a half-open range that one shard holds."""
        first, end = rows
        starts = range(first - first % self.block, end, self.block)
        return max(min(low + self.block, end) - max(low, first) for low in starts)

    def release(self) -> None:
        """Free CUDA graphs."""

    def request(self, ids: Tensor, slots: int) -> Any:
        """What does not depend on the table's values: done a batch ahead, for ids int64 [n]."""
        return ids

    def local_ids(self, request: Any) -> Tensor:
        """Ids of all ranks [U], n of each, as rows of this shard; -1 for rows of other shards."""
        if self.world_size == 1:
            return request
        gathered = request.new_empty(self.world_size * len(request))
        dist.all_gather_into_tensor(gathered, request)
        local = gathered - self.low
        return local.masked_fill_((local < 0) | (local >= self.rows), -1)

    def own_rows(self, rows: Tensor, request: Any) -> Tensor:
        """The rows [n, D] of this rank's ids, from the rows [U, D] looked up by each rank.

        They are sent as they are stored, float32 or fp16, and returned as float32.
        """
        if self.world_size == 1:
            return rows.float()
        own = rows.new_empty(len(rows) // self.world_size, rows.shape[1])
        dist.reduce_scatter_tensor(own, rows)
        return own.float()

    def all_gradients(self, parts: Sequence[Tensor], request: Any) -> Sequence[Tensor]:
        """Gradients of the rows that this rank looked up, from those of this rank's ids.

        Both are one or two tensors, of [U, D] and of [n, D] together.
        """
        if self.world_size == 1:
            return parts
        gradient = joined(parts)
        gathered = gradient.new_empty(len(gradient) * self.world_size, gradient.shape[1])
        dist.all_gather_into_tensor(gathered, gradient.contiguous())
        return [gathered]


def all_sizes(ranks: Ranks) -> Callable[[np.ndarray], np.ndarray]:
    """A function from integers of this rank, [...], to those of all ranks, int64 [W, ...].

    It uses a separate process group, so that the loader's thread may call it during training.
    """
    group = dist.new_group(backend="gloo", timeout=ranks.timeout)

    def gather(sizes: np.ndarray) -> np.ndarray:
        mine = torch.from_numpy(sizes.astype(np.int64))
        found = mine.new_empty(ranks.world_size * len(mine), *mine.shape[1:])
        dist.all_gather_into_tensor(found, mine, group=group)
        return found.view(ranks.world_size, *mine.shape).numpy()

    return gather
