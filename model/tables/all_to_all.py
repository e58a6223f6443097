"""Exchange rows by an all-to-all whose bytes do not grow with the number of ranks.

    a batch ahead    ids of this rank [n] -> different ids, by the shard that holds them -> one slot
                     each in [W, S], empty slots -1  --all-to-all-->  the requests of all ranks [W, S]
    the step         rows of this shard [W S, D]     --all-to-all-->  [W S, D] -> rows of the ids [n, D]
    backward         gradients [n, D], summed by slot [W S, D]  --all-to-all-->  update of the shard

The loaders agree on S, the slots of a step (``pipeline/training/slots.py``): the hosts never wait
for sizes, and a CUDA graph holds all but the first line. That line needs no rows of the table: a
train pipeline runs it a batch ahead, beside the previous step, by a communicator of its own.

Shapes: W ranks, S slots, n ids of a rank, D width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.streamable import Multistreamable

from model.distributed import Ranks, narrow_group
from model.kernels.segment_sum import SortedIndex, add_rows
from model.tables.row_exchange import RowExchange


@dataclass(frozen=True)
class Request(Multistreamable):
    """What this rank requests of all ranks, and all ranks of this one."""

    slots: Tensor  # int64 [n], the slot of each id in [W S]
    order: Tensor  # int64 [n], positions in ``slots`` by ascending slot
    keys: Tensor  # int32 [n], the slots ascending
    received: Tensor  # int64 [W S], rows of this shard; -1: empty

    @property
    def parts(self) -> list[Tensor]:
        return [self.slots, self.order, self.keys, self.received]

    @property
    def is_cuda(self) -> bool:
        return self.slots.is_cuda

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it (CUDA only)."""
        for part in self.parts:
            part.record_stream(stream)


@dataclass(frozen=True)
class AllToAll(RowExchange):
    """The exchange of a rank with the table rows ``low`` ... ``low + rows - 1``."""

    block: int = 0  # rows of every shard but the last ones
    group: dist.ProcessGroup | None = None  # of the requests

    @classmethod
    def of(cls, num_rows: int, ranks: Ranks) -> "AllToAll":
        """The exchange of a table of ``num_rows`` rows, cut as TorchRec cuts it row-wise."""
        cut = RowExchange.of(num_rows, ranks)
        block = -(-num_rows // ranks.world_size)
        return cls(cut.world_size, cut.low, cut.rows, block, narrow_group(ranks))

    def request(self, ids: Tensor, slots: int) -> Request:
        """Request the rows of ids, int64 [n], in ``slots`` slots of each shard."""
        keys, order = ids.int().sort(stable=True)
        is_first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=is_first[1:])
        counted = is_first.cumsum(0)  # different ids up to each
        owner = keys // self.block
        blocks = torch.arange(self.world_size, dtype=torch.int32, device=ids.device) * self.block
        begin = torch.searchsorted(keys, blocks)
        before = torch.cat([counted.new_zeros(1), counted])[begin]
        slot = owner * slots + counted - 1 - before[owner]
        asked = ids.new_full((self.world_size * slots,), -1)
        asked[slot] = (keys - owner * self.block).long()
        received = torch.empty_like(asked)
        dist.all_to_all_single(received, asked, group=self.group)
        return Request(torch.empty_like(slot).scatter_(0, order, slot), order, slot.int(), received)

    def local_ids(self, request: Request) -> Tensor:
        """Rows of this shard that all ranks request [W S]; -1 for empty slots."""
        return request.received

    def own_rows(self, rows: Tensor, request: Request) -> Tensor:
        """The rows [n, D] of this rank's ids, from the rows [W S, D] looked up by each rank."""
        own = torch.empty_like(rows)
        dist.all_to_all_single(own, rows)
        return own.index_select(0, request.slots)

    def all_gradients(self, gradient: Tensor, request: Request) -> Tensor:
        """Gradients [W S, D] of the rows that this rank looked up, from this rank's [n, D]."""
        sums = gradient.new_zeros(len(request.received), gradient.shape[1])
        index = SortedIndex(request.slots, len(sums), request.keys, request.order)
        add_rows(sums, index, gradient)
        received = torch.empty_like(sums)
        dist.all_to_all_single(received, sums)
        return received
