"""Exchange rows by an all-to-all that sends each different row once.

    a batch ahead    ids of this rank [n] -> different ids, by the shard that holds them -> a slot
                     for each in [W, S], empty slots -1  --all-to-all-->  requests of all ranks
    the step         rows of this shard [W S, D]  --all-to-all-->  [W S, D] -> rows of ids [n, D]
    backward         gradients [n, D] -> sum of each slot [W S, D]  --all-to-all-->  update

The loaders agree on S, the slots of a step (``pipeline/training/slots.py``): the hosts never wait
for sizes, and a CUDA graph holds all but the first line. That line needs no rows of the table: the
train pipeline runs it a batch ahead, beside the previous step, by a communicator of its own and as
a CUDA graph of its own: launching its 25 kernels would take the host longer than a small step.

Shapes: W ranks, S slots, n ids of a rank, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.streamable import Multistreamable

from model.distributed import Ranks, narrow_group
from model.kernels.compiler import before_capture
from model.kernels.graphed_call import MAX_GRAPHS
from model.kernels.segment_sum import SortedIndex, sum_rows
from model.tables.row_exchange import RowExchange
from model.tables.row_lookup import rows_or_zeros


@dataclass(frozen=True)
class Request(Multistreamable):
    """What this rank requests of all ranks, and all ranks of this one, in one allocation."""

    words: Tensor  # int64, the parts below
    num_ids: int  # n
    num_slots: int  # W S

    @classmethod
    def of(cls, slots: Tensor, order: Tensor, keys: Tensor, received: Tensor) -> "Request":
        """A request of its parts."""
        pairs = torch.nn.functional.pad(keys.int(), (0, len(keys) % 2)).view(torch.int64)
        words = torch.cat([slots, order, received, pairs])
        return cls(words, len(slots), len(received))

    @property
    def slots(self) -> Tensor:
        """The slot of each id: int64 [n], in [0, W S)."""
        return self.words[: self.num_ids]

    @property
    def by_slot(self) -> SortedIndex:
        """The slots, sorted."""
        n = self.num_ids
        keys = self.words[2 * n + self.num_slots :].view(torch.int32)[:n]
        return SortedIndex(self.slots, self.num_slots, keys, self.words[n : 2 * n])

    @property
    def received(self) -> Tensor:
        """Rows of this shard that all ranks request: int64 [W S]; -1: empty slot."""
        return self.words[2 * self.num_ids :][: self.num_slots]

    def clone(self) -> "Request":
        return replace(self, words=self.words.clone())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until ``stream`` is done with it (CUDA only)."""
        self.words.record_stream(stream)


class AllToAll(RowExchange):
    """The exchange of a rank with the table rows ``low`` ... ``low + rows - 1``.

    Args:
        graphs: whether requests of one shape are a CUDA graph.
    """

    def __init__(self, num_items: int, ranks: Ranks, graphs: bool, num_attributes: int = 0) -> None:
        super().__init__(num_items, ranks, num_attributes)
        self._group = narrow_group(ranks)
        self._with_graphs, self._slots = graphs, 0
        self._graphs: dict[int, _Captured | None] = {}  # by the number of ids

    def request(self, ids: Tensor, slots: int) -> Request:
        """Request the rows of ids, int64 [n], in ``slots`` slots of each shard.

        The number of slots never falls: graphs of fewer slots are dropped.
        """
        if slots > self._slots:
            self.release()
            self._slots = slots
        captured = self._graphs.get(len(ids))
        if captured is not None:
            return captured(ids)
        if self._with_graphs and len(ids) in self._graphs:
            captured = self._graphs[len(ids)] = _Captured(self, ids, slots)
            return captured(ids)
        if len(self._graphs) < MAX_GRAPHS:
            self._graphs[len(ids)] = None  # its kernels are compiled now
        return self._request(ids, slots)

    def release(self) -> None:
        """Drop the graphs; a communicator cannot be closed while a graph sends through it."""
        if any(self._graphs.values()):
            torch.cuda.synchronize()
        for captured in filter(None, self._graphs.values()):
            captured.graph.reset()
        self._graphs.clear()

    def _request(self, ids: Tensor, slots: int) -> Request:
        keys, order = ids.int().sort(stable=True)
        is_first = torch.ones_like(keys, dtype=torch.bool)
        torch.ne(keys[1:], keys[:-1], out=is_first[1:])
        counted = is_first.cumsum(0)  # different ids up to each
        owner = keys // self.block
        blocks = torch.arange(self.world_size, dtype=torch.int32, device=ids.device) * self.block
        begin = torch.searchsorted(keys, blocks)
        before = torch.cat([counted.new_zeros(1), counted])[begin]
        slot = owner * slots + counted - 1 - before[owner]
        sent = ids.new_full((self.world_size * slots,), -1)
        sent.scatter_(0, slot, (keys - owner * self.block).long())
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        return Request.of(torch.empty_like(slot).scatter_(0, order, slot), order, slot, received)

    def local_ids(self, request: Request) -> Tensor:
        """Rows of this shard that all ranks request [W S]; -1 for empty slots."""
        return request.received

    def own_rows(self, rows: Tensor, request: Request) -> Tensor:
        """The rows [n, D] of this rank's ids, from the rows [W S, D] looked up by each rank.

        They are sent as they are stored, float32 or fp16, and returned as float32.
        """
        own = torch.empty_like(rows)
        dist.all_to_all_single(own, rows)
        return rows_or_zeros(own, request.slots)

    def all_gradients(self, parts: Sequence[Tensor], request: Request) -> Sequence[Tensor]:
        """Gradients of the rows that this rank looked up; those of empty slots are undefined."""
        sums = sum_rows(request.by_slot, parts)
        received = torch.empty_like(sums)
        dist.all_to_all_single(received, sums)
        return [received]


class _Captured:
    """The graph of a request, and the memory that it reads and writes."""

    def __init__(self, exchange: AllToAll, ids: Tensor, slots: int) -> None:
        before_capture()
        self.graph = torch.cuda.CUDAGraph()
        self._ids = ids.clone()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self._request = exchange._request(self._ids, slots)

    def __call__(self, ids: Tensor) -> Request:
        self._ids.copy_(ids)
        self.graph.replay()
        return self._request.clone()  # the next replay overwrites it
