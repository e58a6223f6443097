"""Batches of users to recommend to, cut in the same way on any number of ranks.

    users        0 1 2 | 3 4 5 | 6 7 -      3 users a batch, one filler row
    two ranks    rank 0: 0 1 2, then 6 7 -      rank 1: 3 4 5, then - - -

A history is the newest ``max_len - 1`` items and the mask token, as in an evaluation. All batches
have the same number of rows, and a batch's contents do not depend on the number of ranks: nor do
the vectors that a model computes from it. Its seen items are those of the whole history, in its
order, as often as they occur there.
"""

from collections.abc import Iterator

import numpy as np
import torch

from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import jagged_items
from pipeline.batches.times import UNKNOWN, with_gaps
from pipeline.batches.train_batch import rounded_up
from pipeline.jagged import jagged_positions, splits
from pipeline.serving.histories import KnownHistories
from pipeline.stage import Prefetch

_BATCHES_AHEAD = 4


class HistoryBatches:
    """One rank's batches of histories; may be iterated many times. A thread makes batches ahead.

    Args:
        num_items: V.
        max_len: most items of a row, mask token included.
        batch_size: most users of a batch.
        keep_seen: leave the history's items among those to rank.
    """

    def __init__(
        self,
        histories: KnownHistories,
        num_items: int,
        max_len: int,
        batch_size: int,
        keep_seen: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.histories, self.num_items, self.max_len = histories, num_items, max_len
        self.batch_size = min(batch_size, len(histories))
        self.keep_seen, self.rank, self.world_size = keep_seen, rank, world_size

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        users = len(self.histories)
        return -(-users // (self.batch_size * self.world_size)) if users else 0

    def __iter__(self) -> Iterator[EvalBatch]:
        places = range(self.rank, len(self) * self.world_size, self.world_size)
        return Prefetch(map(self._batch, places), _BATCHES_AHEAD)

    def _batch(self, place: int) -> EvalBatch:
        rows = np.arange(self.batch_size)
        users = place * self.batch_size + rows
        users[users >= len(self.histories)] = -1
        offsets, items = self.histories.offsets, self.histories.items
        begin = np.where(users >= 0, offsets[users], 0)
        end = np.where(users >= 0, offsets[users + 1], 0)

        start = np.maximum(begin, end - (self.max_len - 1))
        lengths = end - start + 1
        masked = np.cumsum(lengths) - 1
        values = np.full(lengths.sum(), self.num_items + 1)
        is_item = np.ones(len(values), bool)
        is_item[masked] = False
        values[is_item] = items[jagged_positions(start, end)]

        times = None
        known_times, at = self.histories.times, self.histories.at
        if known_times is not None and at is not None and len(items):
            seconds = np.empty(len(values), np.int64)
            seconds[is_item] = known_times[jagged_positions(start, end)]
            seconds[masked] = np.where(users >= 0, at[users], UNKNOWN)
            before = np.where(start > begin, known_times[start - 1], UNKNOWN)
            times = torch.from_numpy(with_gaps(seconds, masked + 1 - lengths, before))
        if self.keep_seen:
            begin = end
        none = np.zeros((len(users), 0), np.int64)
        return EvalBatch(
            features=jagged_items(torch.from_numpy(values), torch.from_numpy(lengths)),
            masked=torch.from_numpy(masked),
            targets=torch.ones(len(users), dtype=torch.int64),
            users=torch.from_numpy(users),
            is_first=torch.from_numpy(users >= 0),
            negatives=torch.from_numpy(none),
            seen=torch.from_numpy(items[jagged_positions(begin, end)].astype(np.int64)),
            seen_offsets=torch.from_numpy(splits(end - begin)),
            num_rows=len(users),
            longest=rounded_up(int(lengths.max())),
            times=times,
        ).pin_memory()
