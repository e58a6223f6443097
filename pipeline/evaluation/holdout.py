"""Evaluation batches: held-out items, the histories before them, and the items to rank them with.

The history of one user, leave-one-out::

    items            a b c d e f                train    validation   test
    validation       a b c d [mask]             a..d     e
    test             a b c d  e  [mask]         a..d     e            f

Inputs are cut to the newest ``max_len - 1`` items and the mask token. Seen items, which a full
ranking leaves out, are those of the whole history before the target; none if they are kept.

Negatives are items outside the user's whole history, drawn without replacement by popularity in the
training parts (BERT4Rec, arXiv 1904.06690, section 4.2). They depend only on (seed, split, user),
not on the batch size or the number of ranks. If seen items are kept, all items but the target are
drawn from.

Shapes: B users, N negatives of each, V items.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import jagged_items
from pipeline.batches.train_batch import rounded_up
from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from pipeline.jagged import jagged_positions, row_item_keys
from pipeline.preparation.store import SequenceStore
from pipeline.rng import child_keys, key64, unit_floats
from pipeline.stage import Prefetch

SPLITS = ("validation", "test")
# Draws per user in each round; users that still lack distinct unseen items get an exact draw.
_DRAWS = (192, 768, 3072)
_BATCHES_AHEAD = 4


class NegativeSampler:
    """Draws unseen items by ``train_item_counts``, int64 [V + 2], their training occurrences."""

    def __init__(
        self, train_item_counts: np.ndarray, config: HoldoutConfig, split: str = "test"
    ) -> None:
        self.items = np.flatnonzero(train_item_counts)
        self.num_negatives = min(config.eval_negatives, len(self.items))
        self.weights = train_item_counts[self.items].astype(np.float64)
        cumulated = np.cumsum(self.weights)
        self.shares = cumulated / cumulated[-1]
        self.id_bound = len(train_item_counts)
        self.key = key64(config.eval_negatives_seed, SPLITS.index(split))

    def __call__(self, users: np.ndarray, history_keys: np.ndarray) -> np.ndarray:
        """Negatives of B users: int64 [B, N], in the order drawn.

        A user with fewer than N unseen items of positive count gets these, ascending, then zeros.

        Args:
            users: int64 [B], numbers in the sequence store.
            history_keys: int64, sorted and distinct: ``b * (V + 2) + item`` for every item in the
                history of ``users[b]``.
        """
        negatives = np.zeros((len(users), self.num_negatives), dtype=np.int64)
        user_keys = child_keys(self.key, users)
        pending = np.arange(len(users))
        for num_draws in _DRAWS:
            if len(pending) == 0:
                break
            # A round repeats the draws of the round before and adds more.
            keys = child_keys(user_keys[pending, None], np.arange(num_draws)[None, :])
            drawn = self.items[np.searchsorted(self.shares, unit_floats(keys), side="right")]
            found = self._first_unseen(pending, drawn, history_keys)
            complete = found[:, -1] > 0
            negatives[pending[complete]] = found[complete]
            pending = pending[~complete]
        for row in pending:
            negatives[row] = self._exact(int(row), user_keys[row : row + 1], history_keys)
        return negatives

    def _first_unseen(
        self, rows: np.ndarray, drawn: np.ndarray, history_keys: np.ndarray
    ) -> np.ndarray:
        """The first N distinct unseen items of each row's draws, then 0: int64 [B, N]."""
        keys = (rows[:, None] * self.id_bound + drawn).ravel()
        unseen = np.flatnonzero(~_contains(history_keys, keys))
        _, first = np.unique(keys[unseen], return_index=True)
        places = np.sort(unseen[first])
        row, num_rows = places // drawn.shape[1], len(rows)
        rank = np.arange(len(places)) - np.searchsorted(row, np.arange(num_rows))[row]
        kept = rank < self.num_negatives
        found = np.zeros((num_rows, self.num_negatives), dtype=np.int64)
        found[row[kept], rank[kept]] = drawn.ravel()[places[kept]]
        return found

    def _exact(self, row: int, user_key: np.ndarray, history_keys: np.ndarray) -> np.ndarray:
        """One user's negatives, drawn from all unseen items: int64 [N].

        Items sorted by exponential arrival times, with the counts as rates, are in the order of
        draws without replacement (Efraimidis and Spirakis, 2006).
        """
        unseen = ~_contains(history_keys, row * self.id_bound + self.items)
        items, weights = self.items[unseen], self.weights[unseen]
        if len(items) > self.num_negatives:
            arrivals = -np.log1p(-unit_floats(child_keys(user_key, ~items))) / weights
            items = items[np.argsort(arrivals, kind="stable")[: self.num_negatives]]
        return np.pad(items, (0, self.num_negatives - len(items)))


class EvalLoader:
    """One rank's evaluation batches; may be iterated many times.

    Rank r evaluates the evaluable users r, r + world size, ... All ranks have the same number of
    batches and rows: missing users are filler rows (user -1, one mask token, target 1, no
    negatives, nothing seen). A thread makes batches ahead; negatives are drawn in the first pass
    and kept (4 bytes each).

    Args:
        split: "validation" or "test".
        max_len: most items of a row, mask token included.
        batch_size: users per batch.
        candidate_range: half-open range of item ids that this rank scores; put into each batch.
        keep_seen: rank a user's seen items like all others.

    Raises:
        UserError: no user has 3 items, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        store: SequenceStore,
        split: str,
        max_len: int,
        batch_size: int,
        config: HoldoutConfig | None = None,
        rank: int = 0,
        world_size: int = 1,
        candidate_range: tuple[int, int] | None = None,
        keep_seen: bool = False,
    ) -> None:
        assert split in SPLITS and 0 <= rank < world_size and max_len >= 1
        if batch_size < 1:
            flag = "val_batch_size" if split == "validation" else "test_batch_size"
            raise UserError(f"--{flag} must be at least 1, not {batch_size}")
        users = store.evaluable_users()
        if len(users) == 0:
            raise UserError("no user has the 3 items that evaluation needs: nothing to evaluate")
        self.store, self.split = store, split
        self.max_len, self.batch_size = max_len, batch_size
        self.candidate_range, self.keep_seen = candidate_range, keep_seen
        per_rank = -(-len(users) // world_size)
        padded = np.append(users, np.full(per_rank * world_size - len(users), -1))
        self.users = padded[rank::world_size]
        self._holdout = config or HoldoutConfig()
        self._negatives: dict[int, np.ndarray] = {}

    @cached_property
    def _sampler(self) -> NegativeSampler:
        """Made at first use, which takes seconds for a large catalog."""
        return NegativeSampler(self.store.train_item_counts, self._holdout, self.split)

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-len(self.users) // self.batch_size)

    def users_and_negatives(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This rank's users of each batch, int64 [B], and their negatives, int64 [B, N].

        Only after the batches were iterated, which draws the negatives.
        """
        for index in range(len(self)):
            users = self.users[index * self.batch_size : (index + 1) * self.batch_size]
            yield users[users >= 0], self._negatives[index]

    def __iter__(self) -> Iterator[EvalBatch]:
        return Prefetch(map(self._batch, range(len(self))), _BATCHES_AHEAD)

    def _batch(self, index: int) -> EvalBatch:
        users = self.users[index * self.batch_size : (index + 1) * self.batch_size]
        is_user, back = users >= 0, 2 if self.split == "validation" else 1
        num_users, num_fillers = is_user.sum(), (~is_user).sum()  # the fillers come last
        begin = np.where(is_user, self.store.offsets[users], 0)
        end = np.where(is_user, self.store.offsets[users + 1], back)
        target_at = end - back  # 0 of a filler row: its only item becomes the mask token

        start = np.maximum(begin, target_at - (self.max_len - 1))
        values = self.store.items[jagged_positions(start, target_at + 1)]
        lengths = target_at + 1 - start
        masked = np.cumsum(lengths) - 1
        targets = np.where(is_user, values[masked], 1)
        values[masked] = self.store.num_items + 1

        id_bound = self.store.num_items + 2
        rows = np.arange(len(users))
        target_keys = rows * id_bound + targets
        seen = np.empty(0, np.int64)
        if not self.keep_seen:
            known = row_item_keys(self.store.items, begin, target_at, id_bound)
            seen = np.setdiff1d(known, target_keys, assume_unique=True)
        if index not in self._negatives:
            excluded = target_keys
            if not self.keep_seen:
                excluded = row_item_keys(self.store.items, begin, end, id_bound)
            drawn = self._sampler(users[:num_users], excluded)
            self._negatives[index] = drawn.astype(np.int32)

        return EvalBatch(
            features=jagged_items(_int64(values), _int64(lengths)),
            masked=_int64(masked),
            targets=_int64(targets),
            users=_int64(users),
            negatives=_int64(np.pad(self._negatives[index], ((0, num_fillers), (0, 0)))),
            seen=_int64(seen % id_bound),
            seen_offsets=_int64(np.searchsorted(seen, np.arange(len(users) + 1) * id_bound)),
            num_rows=len(users),
            longest=rounded_up(int(lengths.max())),
            candidate_range=self.candidate_range,
        ).pin_memory()


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of the keys are among the sorted ones: bool [N]."""
    if len(sorted_keys) == 0:
        return np.zeros(len(keys), dtype=bool)
    places = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(places, len(sorted_keys) - 1)] == keys


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
