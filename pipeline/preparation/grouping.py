"""The order of a user's ratings: by exact time, equal times as in the data.

histories = next(GroupByUser(DropDuplicates(EncodeIds(ReadRatings("ratings.csv")))))
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.jagged import splits
from pipeline.preparation.held import Held, HeldByUser, Joined, added
from pipeline.preparation.memory import Memory
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


_FIELDS = {"item": "items", "timestamp": "times", "fraction": "fractions"}


@dataclass(frozen=True)
class _Placed:
    """N ratings with their places among all."""

    user: np.ndarray  # int32 [N]
    item: np.ndarray  # int32 [N]
    timestamp: np.ndarray  # int64 [N]
    place: np.ndarray  # int64 [N]
    fraction: np.ndarray | None = None  # float64 [N]


@dataclass(eq=False)
class DropDuplicates(CountingStage):
    """Keep the first of the ratings with the same user, item and time."""

    memory: Memory = field(default_factory=Memory)

    def chunks(self) -> Iterator[RatingChunk]:
        held, by_user, size = Held[RatingChunk](self.memory), HeldByUser[_Placed](self.memory), 0
        for chunk in self.source:
            if chunk.timestamp is None:
                raise UserError(
                    "--duplicates drop: the data has no time column; leave the flag out"
                )
            held.add(chunk)
            place = np.arange(size, size := size + len(chunk.user))
            by_user.add(_Placed(chunk.user, chunk.item, chunk.timestamp, place, chunk.fraction))
        keep = np.zeros(size, bool)
        for part in by_user.parts():
            keys = _user_time_keys(part["user"], part["timestamp"], part.get("fraction"))
            order = np.argsort(keys, kind="stable")
            ties = _tie_and_item(keys[order], part["item"][order])
            _, first = np.unique(ties, return_index=True)
            keep[part["place"][order[first]]] = True
        start = 0
        for chunk in held.drained():
            yield chunk.where(keep[start : start + len(chunk.user)])
            start += len(chunk.user)


class GroupByUser(Stage[Histories]):
    """All chunks -> one `Histories`, by a stable sort by user, part and time.

    A user's ratings with equal times keep the order of the file, or if it is `newest_first` the
    reverse order: an unstable sort would change the targets of MovieLens, where many times are
    equal. Beyond the memory's limit the users are sorted range by range.

    Once streamed, ``ties`` is the number of ratings that share user and time with another one,
    ``duplicates`` that of further ratings with the same item too (both 0 without times), and
    ``is_newest_first`` tells whether no time is above the one before it in the file, or in each
    user's part of it, and some are below.
    """

    def __init__(
        self, source: Any, newest_first: bool = False, memory: Memory | None = None
    ) -> None:
        super().__init__(source)
        self.newest_first, self.memory = newest_first, memory or Memory()
        self.ties = self.duplicates = 0
        self.is_newest_first = False
        self._sizes = np.zeros(0, np.int64)  # ratings of each part of each user

    def stream(self) -> Iterator[Histories]:
        held, order = HeldByUser[RatingChunk](self.memory), _OrderOfTimes()
        for chunk in self.source:
            if chunk.timestamp is not None:
                order.see(chunk.user, chunk.timestamp)
            held.add(chunk)
        if not len(held.lengths):
            return
        self.is_newest_first = order.falls
        self.ties = self.duplicates = 0
        self._sizes = np.zeros(0, np.int64)
        joined: dict[str, Joined] = {}
        for part in held.parts():
            self._sort(part)
            for role, name in _FIELDS.items():
                if role in part:
                    joined.setdefault(name, Joined(self.memory)).add(part.pop(role))
        arrays = {name: each.array() for name, each in joined.items()}
        offsets = splits(held.lengths[: np.flatnonzero(held.lengths)[-1] + 1])
        if len(self._sizes):
            sizes = np.zeros((len(offsets) - 1, PARTS), np.int64)
            flat = sizes.reshape(-1)
            flat[: len(self._sizes)] = self._sizes[: len(flat)]
            arrays["ends"] = offsets[:-1] + np.cumsum(sizes, axis=1).T[: PARTS - 1]
        yield Histories(offsets=offsets, **arrays)

    def _sort(self, part: dict[str, np.ndarray]) -> None:
        """Sort the columns in place; drops those of the users and parts."""
        if self.newest_first:
            part |= {role: column[::-1] for role, column in part.items()}
        key = part.pop("user")
        if "part" in part:
            key = key.astype(np.int64) * PARTS + part.pop("part")
            self._sizes = added(self._sizes, key)
        if "timestamp" in part:
            key = _user_time_keys(key, part["timestamp"], part.get("fraction"))
        if (key[1:] < key[:-1]).any():
            order = np.argsort(key, kind="stable")
            key = key[order]
            for role in part:
                part[role] = part[role][order]
        if "timestamp" in part:
            self._count(key, part["item"])

    def _count(self, keys: np.ndarray, items: np.ndarray) -> None:
        equal = np.concatenate([[False], keys[1:] == keys[:-1], [False]])
        tied = equal[1:] | equal[:-1]
        self.ties += int(tied.sum())
        found = np.sort(_tie_and_item(keys[tied], items[tied]))
        self.duplicates += int((found[1:] == found[:-1]).sum())


class _OrderOfTimes:
    """Whether times never rise in the file, or in the users' parts of it, and fall somewhere."""

    def __init__(self) -> None:
        self._rises = self._falls = self._rises_within = self._falls_within = False
        self._changes = self._last_user = 0  # changes from a user to another one; the highest user
        self._before: tuple[np.ndarray, ...] | None = None

    def see(self, users: np.ndarray, times: np.ndarray) -> None:
        """Take in the next ratings of the file."""
        assert times.dtype == np.int64, "times that are not whole numbers have a fraction"
        if self._before is not None:
            pairs = zip(self._before, (users, times), strict=True)
            users, times = (np.concatenate(pair) for pair in pairs)
        self._before = users[-1:], times[-1:]
        rises, falls = times[1:] > times[:-1], times[1:] < times[:-1]
        same = users[1:] == users[:-1]
        self._rises |= bool(rises.any())
        self._falls |= bool(falls.any())
        self._rises_within |= bool((rises & same).any())
        self._falls_within |= bool((falls & same).any())
        self._changes += len(same) - int(np.count_nonzero(same))
        self._last_user = max(self._last_user, int(users.max()))

    @property
    def falls(self) -> bool:
        if self._falls and not self._rises:
            return True
        one_part_each = self._changes == self._last_user
        return one_part_each and self._falls_within and not self._rises_within


def _tie_and_item(keys: np.ndarray, items: np.ndarray) -> np.ndarray:
    """int64 [R]: equal for ratings with equal keys (ascending) and equal items."""
    ties = np.concatenate([[0], np.cumsum(keys[1:] != keys[:-1])])[: len(keys)]
    return ties * (int(items.max(initial=0)) + 1) + items


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
