"""Evaluation batches: held-out items, the histories before them, and the items to rank them with.

The history of one user, leave-one-out; other splits cut it elsewhere (``preparation/parts.py``)::

    items            a b c d e f                train    validation   test
    validation       a b c d [mask]             a..d     e
    test             a b c d  e  [mask]         a..d     e            f

With several targets of a user, each has a row; the history is the same, none of them is in it.

Inputs are cut to the newest ``max_len - 1`` items and the mask token. Seen items, which a full
ranking leaves out, are those of the whole history before the target; none if they are kept.

Negatives are items outside the user's whole history, drawn without replacement by popularity in the
training parts (BERT4Rec, arXiv 1904.06690, section 4.2); unless the split is leave-one-out, nothing
after the evaluated part is looked at. They depend only on (seed, split, user), not on the batch
size or the number of ranks: all targets of a user have the same. If seen items are kept, all items
but the targets are drawn from.

Shapes: B users, N negatives of each, V items.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pipeline.batches.eval_batch import EvalBatch
from pipeline.batches.features import jagged_items
from pipeline.batches.times import ItemTimes
from pipeline.batches.train_batch import rounded_up
from pipeline.errors import UserError
from pipeline.evaluation.config import HoldoutConfig
from pipeline.jagged import jagged_positions, row_item_keys
from pipeline.preparation.parts import SPLITS
from pipeline.preparation.store import SequenceStore
from pipeline.rng import child_keys, key64, unit_floats
from pipeline.stage import Prefetch

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

    Rank r evaluates the evaluable users r, r + world size, ... with all of their targets. All ranks
    have the same number of batches and rows: missing targets are filler rows (user -1, one mask
    token, target 1, no negatives, nothing seen). A thread makes batches ahead; negatives are drawn
    in the first pass and kept (4 bytes each).

    ``users`` and ``places``, int64 [T], are the user of each row, -1 of filler rows, and the place
    of its target in the store's items.

    Args:
        split: "validation" or "test".
        max_len: most items of a row, mask token included.
        batch_size: targets per batch, at least 1.
        keep_seen: rank a user's seen items like all others.
        times: of the store's items, put into each batch; None: batches have no times.

    Raises:
        UserError: no user has a target.
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
        keep_seen: bool = False,
        times: ItemTimes | None = None,
    ) -> None:
        assert split in SPLITS and 0 <= rank < world_size and max_len >= 1 and batch_size >= 1
        self._holdout = config or HoldoutConfig()
        self._every = self._holdout.targets == "all"
        users, places = store.parts.targets(split, store.items, self._every)
        if len(users) == 0:
            needed = "the 3 items that evaluation needs"
            if store.split:
                needed = f"a rating of the {split} part and one before it"
            raise UserError(f"no user has {needed}: nothing to evaluate")
        self.store, self.split = store, split
        self.max_len, self.batch_size = max_len, batch_size
        self.keep_seen, self._times = keep_seen, times
        is_first = np.diff(users, prepend=-1) > 0
        of_rank = (np.cumsum(is_first) - 1) % world_size
        fillers = np.bincount(of_rank, minlength=world_size).max() - (of_rank == rank).sum()
        self.users, self.places = (
            np.append(each[of_rank == rank], np.full(fillers, filler))
            for each, filler in ((users, -1), (places, 0))
        )
        self._negatives: dict[int, np.ndarray] = {}

    @cached_property
    def _sampler(self) -> NegativeSampler:
        """Made at first use, which takes seconds for a large catalog."""
        return NegativeSampler(self.store.train_item_counts, self._holdout, self.split)

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-len(self.users) // self.batch_size)

    def targets_and_negatives(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """This rank's users and target places of each batch, int64 [B], and negatives [B, N].

        Without filler rows. Only after the batches were iterated, which draws the negatives.
        """
        for index in range(len(self)):
            block = slice(index * self.batch_size, (index + 1) * self.batch_size)
            is_user = self.users[block] >= 0
            yield self.users[block][is_user], self.places[block][is_user], self._negatives[index]

    def __iter__(self) -> Iterator[EvalBatch]:
        return Prefetch(map(self._batch, range(len(self))), _BATCHES_AHEAD)

    def _batch(self, index: int) -> EvalBatch:
        block = slice(index * self.batch_size, (index + 1) * self.batch_size)
        users, places = self.users[block], self.places[block]
        items, is_user, bounds = self.store.items, users >= 0, self._bounds(users)
        before = self.users[block.start - 1] if index else -1
        is_first = np.diff(users, prepend=before) != 0
        has_history = is_first.copy()
        has_history[0] = True

        # From the start to the first item of the part, in whose place the mask token is.
        end = bounds.known_end + 1
        start = np.where(has_history, np.maximum(bounds.begin, end - self.max_len), end - 1)
        values, lengths = items[jagged_positions(start, end)], end - start
        masked = np.cumsum(lengths) - 1
        values[masked] = self.store.num_items + 1
        targets = np.where(is_user, items[places], 1)
        times = None
        if self._times is not None:  # the first target of a part is its first item
            times = _int64(self._times.rows(start, end))
        rows, id_bound = np.arange(len(users)), self.store.num_items + 2
        seen, negatives = self._seen_and_negatives(index, users, rows * id_bound + targets, bounds)
        return EvalBatch(
            features=jagged_items(_int64(values), _int64(lengths)),
            masked=_int64(masked),
            targets=_int64(targets),
            users=_int64(users),
            is_first=torch.from_numpy(is_first & is_user),
            negatives=_int64(negatives),
            seen=_int64(seen % id_bound),
            seen_offsets=_int64(np.searchsorted(seen, np.arange(len(users) + 1) * id_bound)),
            num_rows=len(users),
            longest=rounded_up(int(lengths.max())),
            encoded_row=_int64(np.maximum.accumulate(has_history * rows)) if self._every else None,
            times=times,
        ).pin_memory()

    def _bounds(self, users: np.ndarray) -> "_Bounds":
        parts, split = self.store.parts, self.split
        of_all = (
            parts.begin,
            parts.history_end(split),
            parts.excluded_end(split),
            parts.targets_end(split),
        )
        # 0 of a filler row: it has the mask token alone.
        return _Bounds(*(np.where(users >= 0, places[users], 0) for places in of_all))

    def _seen_and_negatives(
        self, index: int, users: np.ndarray, target_keys: np.ndarray, bounds: "_Bounds"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seen items as ascending keys, int64 [S], and negatives of each row, int32 [B, N].

        Args:
            index: number of the batch, whose negatives are drawn once and kept.
            target_keys: int64 [B], ``row * (V + 2) + target``; keys of seen items are made alike.
        """
        items, id_bound = self.store.items, self.store.num_items + 2
        if self._every:  # all targets of a row's user count as its own
            of_users = row_item_keys(items, bounds.known_end, bounds.targets_end, id_bound)
            target_keys = np.union1d(target_keys, of_users)
        seen, excluded = np.empty(0, np.int64), target_keys
        if not self.keep_seen:
            known = row_item_keys(items, bounds.begin, bounds.known_end, id_bound)
            seen = np.setdiff1d(known, target_keys, assume_unique=True)
        num_users = int((users >= 0).sum())  # the fillers come last
        if index not in self._negatives:
            if not self.keep_seen:
                excluded = row_item_keys(items, bounds.begin, bounds.excluded_end, id_bound)
            drawn = self._sampler(users[:num_users], excluded)
            self._negatives[index] = drawn.astype(np.int32)
        return seen, np.pad(self._negatives[index], ((0, len(users) - num_users), (0, 0)))


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Places in the store's items, int64 [B] each, of a batch's rows."""

    begin: np.ndarray  # of the history
    known_end: np.ndarray  # of the history before the targets
    excluded_end: np.ndarray  # of the items that are no negatives
    targets_end: np.ndarray


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Which of the keys are among the sorted ones: bool [N]."""
    if len(sorted_keys) == 0:
        return np.zeros(len(keys), dtype=bool)
    places = np.searchsorted(sorted_keys, keys)
    return sorted_keys[np.minimum(places, len(sorted_keys) - 1)] == keys


def _int64(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.int64))
