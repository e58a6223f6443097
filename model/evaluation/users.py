"""Users of a batch, encoded; of all ranks if the catalog is sharded.

A user with several targets is here as often.

Shapes: U users, D width, N negatives, S seen items of all users.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from model.bert4rec import BERT4Rec
from model.losses.sharded_softmax import all_gather_rows
from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import ITEM


@dataclass
class EncodedUsers:
    """Users of a batch (of all ranks if the catalog is sharded) and the items to rank."""

    hidden: Tensor  # float32 [U, D]
    targets: Tensor  # int64 [U]
    negatives: Tensor  # int64 [U, N], 0 = none
    own: Tensor  # bool [U], this rank's real users
    first: Tensor  # bool [U], those of them with their first target
    seen: Tensor  # int64 [S], 0 = none
    seen_row: Tensor  # int64 [S], the user of each seen item; any user for 0

    def blocks(self, size: int) -> Iterator["EncodedUsers"]:
        """Blocks of at most ``size`` users; the same number on every rank."""
        users = self.targets.numel()
        if 0 < users <= size:
            yield self
            return
        for start in range(0, users, size):
            block = slice(start, start + size)
            each = self.hidden, self.targets, self.negatives, self.own, self.first
            hidden, targets, negatives, own, first = (part[block] for part in each)
            # The others' items become 0: to leave them out, the host would wait for their number.
            inside = (self.seen_row >= start) & (self.seen_row < start + size)
            seen = self.seen * inside, (self.seen_row - start) * inside
            yield EncodedUsers(hidden, targets, negatives, own, first, *seen)


def vectors(
    bert: BERT4Rec,
    items: Tensor,
    offsets: Tensor,
    masked: Tensor,
    longest: int | None,
    times: Tensor | None = None,
) -> Tensor:
    """Vectors [U, D] of the positions ``masked`` of rows, as :meth:`Encoder.forward` takes them."""
    left_only = torch.ones_like(offsets[1:], dtype=torch.bool) if bert.left_only else None
    with torch.autocast("cuda", torch.bfloat16, enabled=bert.autocast):
        hidden = bert.encoder(items, offsets, masked, left_only, None, times, longest=longest)
    return bert.head.project(hidden)


def encode(bert: BERT4Rec, batch: EvalBatch) -> EncodedUsers:
    """Encode a batch's users; if the catalog is sharded, gather the users of all ranks."""
    rows = bert.embeddings(batch)
    offsets = rows[ITEM].offsets()[: batch.num_rows + 1]
    items = bert.item_rows(rows, batch.features.values())
    hidden = vectors(bert, items, offsets, batch.masked, batch.longest, batch.times)
    if batch.encoded_row is not None:
        hidden = hidden[batch.encoded_row]
    counts = batch.seen_offsets.diff()
    seen_row = torch.repeat_interleave(counts, output_size=batch.seen.numel())
    targets, negatives, seen = batch.targets, batch.negatives, batch.seen
    own, is_first = batch.users >= 0, batch.is_first
    if bert.head.catalog.shared:
        hidden, sizes = all_gather_rows(hidden)
        targets, negatives, seen = (all_gather_rows(t)[0] for t in (targets, negatives, seen))
        first = dist.get_rank() * max(sizes)
        seen_row, _ = all_gather_rows(seen_row + first)
        places = (first, len(hidden) - first - len(own))
        own, is_first = F.pad(own, places), F.pad(is_first, places)
    return EncodedUsers(hidden, targets, negatives, own, is_first, seen, seen_row)
