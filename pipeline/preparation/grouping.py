"""The order of a user's ratings: by exact time, equal times as in the data.

histories = next(GroupByUser(DropDuplicates(EncodeIds(ReadRatings("ratings.csv")))))
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.jagged import splits
from pipeline.preparation.parts import PARTS
from pipeline.preparation.stages import CountingStage, RatingChunk
from pipeline.stage import Stage


@dataclass(frozen=True)
class Histories:
    """User u's items, in time order, are items[offsets[u]:offsets[u + 1]]."""

    items: np.ndarray  # int32 [R]
    offsets: np.ndarray  # int64 [U+1]
    times: np.ndarray | None = None  # int64 [R], whole parts
    fractions: np.ndarray | None = None  # float64 [R]
    ends: np.ndarray | None = None  # int64 [2, U], of the training and validation parts


class DropDuplicates(CountingStage):
    """Keep the first of the ratings with the same user, item and time."""

    def chunks(self) -> Iterator[RatingChunk]:
        chunks = list(self.source)
        if not chunks:
            return
        if chunks[0].timestamp is None:
            raise UserError("--duplicates drop: the data has no time column; leave the flag out")
        users, items = (_joined(chunks, name) for name in ("user", "item"))
        times, fractions = _times(chunks)
        assert times is not None
        keys = _user_time_keys(users, times, fractions)
        order = np.argsort(keys, kind="stable")
        _, first = np.unique(_tie_and_item(keys[order], items[order]), return_index=True)
        keep = np.zeros(len(users), bool)
        keep[order[first]] = True
        ends = np.cumsum([len(chunk.user) for chunk in chunks])[:-1]
        for chunk, kept in zip(chunks, np.split(keep, ends), strict=True):
            yield chunk.where(kept)


class GroupByUser(Stage[Histories]):
    """All chunks -> one `Histories`, by a stable sort by user, part and time.

    A user's ratings with equal times keep the order of the file, or if it is `newest_first` the
    reverse order: an unstable sort would change the targets of MovieLens, where many times are
    equal.

    Once streamed, ``ties`` is the number of ratings that share user and time with another one,
    ``duplicates`` that of further ratings with the same item too (both 0 without times), and
    ``is_newest_first`` tells whether no time is above the one before it in the file, or in each
    user's part of it, and some are below.
    """

    def __init__(self, source: Any, newest_first: bool = False) -> None:
        super().__init__(source)
        self.newest_first = newest_first
        self.ties = self.duplicates = 0
        self.is_newest_first = False

    def stream(self) -> Iterator[Histories]:
        chunks = list(self.source)
        if not chunks:
            return
        users, items = (_joined(chunks, name) for name in ("user", "item"))
        times, fractions = _times(chunks)
        owners, has_parts = users, chunks[0].part is not None
        if has_parts:
            owners = users.astype(np.int64) * PARTS + _joined(chunks, "part")
        del chunks
        self.is_newest_first = times is not None and _falls(users, times)
        if self.newest_first:
            users, items, owners = users[::-1], items[::-1], owners[::-1]
            times = None if times is None else times[::-1]
            fractions = None if fractions is None else fractions[::-1]
        offsets = splits(np.bincount(users))
        ends = None
        if has_parts:
            sizes = np.bincount(owners, minlength=PARTS * (len(offsets) - 1)).reshape(-1, PARTS)
            ends = offsets[:-1] + np.cumsum(sizes, axis=1).T[: PARTS - 1]
        key = owners if times is None else _user_time_keys(owners, times, fractions)
        del users, owners
        order = None
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            items, key = items[order], key[order]
        if times is not None:
            self._count(key, items)
        del key
        if order is not None:
            times = None if times is None else times[order]
            fractions = None if fractions is None else fractions[order]
        yield Histories(items, offsets, times, fractions, ends)

    def _count(self, keys: np.ndarray, items: np.ndarray) -> None:
        equal = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
        tied = equal[1:] | equal[:-1]
        self.ties = int(tied.sum())
        found = np.sort(_tie_and_item(keys[tied], items[tied]))
        self.duplicates = int((found[1:] == found[:-1]).sum())


def _falls(users: np.ndarray, times: np.ndarray) -> bool:
    """Whether times never rise in the file, or in the users' parts of it, and fall somewhere."""
    rises, falls = times[1:] > times[:-1], times[1:] < times[:-1]
    if falls.any() and not rises.any():
        return True
    same = users[1:] == users[:-1]
    one_part_each = len(same) - np.count_nonzero(same) == int(users.max())
    return bool(one_part_each and (falls & same).any() and not (rises & same).any())


def _tie_and_item(keys: np.ndarray, items: np.ndarray) -> np.ndarray:
    """int64 [R]: equal for ratings with equal keys (ascending) and equal items."""
    ties = np.concatenate([[0], np.cumsum(keys[1:] != keys[:-1])])[: len(keys)]
    return ties * (int(items.max(initial=0)) + 1) + items


def _joined(chunks: list[RatingChunk], name: str) -> np.ndarray:
    return np.concatenate([getattr(chunk, name) for chunk in chunks])


def _times(chunks: list[RatingChunk]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Times of all chunks, whole parts and fractions; None: there are no times, no fractions."""
    if chunks[0].timestamp is None:
        return None, None
    times = np.concatenate([chunk.timestamp for chunk in chunks])
    assert times.dtype == np.int64, "times that are not whole numbers have a fraction"
    if all(chunk.fraction is None for chunk in chunks):
        return times, None
    none = [
        np.zeros(len(chunk.user)) if chunk.fraction is None else chunk.fraction for chunk in chunks
    ]
    return times, np.concatenate(none)


def _user_time_keys(
    users: np.ndarray, times: np.ndarray, fractions: np.ndarray | None
) -> np.ndarray:
    """int64 [R] in the order of users, then times; sorting them beats np.lexsort fourfold."""
    span = int(times.max()) - int(times.min()) + 1
    if fractions is None and span * (int(users.max()) + 1) < 1 << 63:
        times = times - times.min()
    else:
        times = _ranks(times, fractions)
        span = int(times.max()) + 1
    keys = np.multiply(users, span, dtype=np.int64)
    keys += times
    return keys


def _ranks(times: np.ndarray, fractions: np.ndarray | None) -> np.ndarray:
    """int64 [R]: the place of each time among the distinct ones, from 0."""
    if fractions is None:
        return np.unique(times, return_inverse=True)[1]
    order = np.lexsort((fractions, times))
    times, fractions = times[order], fractions[order]
    later = (times[1:] != times[:-1]) | (fractions[1:] != fractions[:-1])
    ranks = np.zeros(len(order), np.int64)
    ranks[order[1:]] = np.cumsum(later)
    return ranks
