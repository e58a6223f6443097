"""The stages between a ratings file and histories: encode, filter, densify, group.

    dense = Densify(FilterRatings(EncodeIds(ReadRatings("ratings.csv")), min_rating=4))
    histories = next(GroupByUser(dense))

Afterwards a stage's `counts` describe its output.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.jagged import splits
from pipeline.stage import Stage

T = TypeVar("T")


@dataclass(frozen=True)
class RatingChunk:
    """N ratings in file order."""

    user: np.ndarray  # int32 [N], codes from 0
    item: np.ndarray  # int32 [N], codes from 0; once densified, ids from 1
    rating: np.ndarray | None = None  # float64 [N]
    timestamp: np.ndarray | None = None  # int64 [N]; None: file order is time order
    # float64 [N], the rest of times that are not whole (pipeline/sources/values.py); None: 0.
    fraction: np.ndarray | None = None

    def where(self, keep: np.ndarray) -> "RatingChunk":
        if keep.all():
            return self
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return RatingChunk(**{name: column[keep] for name, column in columns.items()})


@dataclass(frozen=True)
class Histories:
    """User u's items, in time order, are items[offsets[u]:offsets[u + 1]]."""

    items: np.ndarray  # int32 [R]
    offsets: np.ndarray  # int64 [U+1]
    times: np.ndarray | None = None  # int64 [R], whole parts
    fractions: np.ndarray | None = None  # float64 [R]


class CountingStage(Stage[RatingChunk]):
    """A stage whose subclasses implement `chunks`; it counts their output."""

    def stream(self) -> Iterator[RatingChunk]:
        self._ratings, self._users, self._items = 0, np.zeros(0, bool), np.zeros(0, bool)
        for chunk in self.chunks():
            if len(chunk.user):
                self._ratings += len(chunk.user)
                self._users = _marked(self._users, chunk.user)
                self._items = _marked(self._items, chunk.item)
                yield chunk

    def chunks(self) -> Iterator[RatingChunk]:
        raise NotImplementedError(type(self))

    @property
    def counts(self) -> dict[str, int]:
        return {
            "ratings": self._ratings,
            "users": int(self._users.sum()),
            "items": int(self._items.sum()),
        }


class EncodeIds(CountingStage):
    """Arrow tables -> `RatingChunk`s: original ids become int32 codes, in ascending order of ids.

    Ids are sorted as numbers if all are whole numbers, else as text: codes do not depend on the
    file's chunks. Once streamed, string arrays ``users`` and ``items`` hold the original id of
    every code, ``types`` the type of both in the source: string, or int64 for columns of whole
    numbers.
    """

    def chunks(self) -> Iterator[RatingChunk]:
        batches: list[tuple[np.ndarray | None, ...]] = []
        dictionaries: dict[str, list[pa.Array]] = {"user": [], "item": []}
        for table in self.source:
            for batch in table.to_batches():
                indices = []
                for role, of_role in dictionaries.items():
                    column = batch.column(role)
                    if not pa.types.is_dictionary(column.type):
                        column = column.dictionary_encode()
                    of_role.append(column.dictionary)
                    indices.append(column.indices.to_numpy(zero_copy_only=False))
                values = (_numpy(batch, name) for name in ("rating", "timestamp", "fraction"))
                batches.append((*indices, *values))
        if not batches:
            raise UserError("there are no ratings in the data set")
        self.types = {role: _id_type(parts) for role, parts in dictionaries.items()}
        self.users, users = _encoded(dictionaries["user"])
        self.items, items = _encoded(dictionaries["item"])
        for at, (user, item, *others) in enumerate(_drained(batches)):
            yield RatingChunk(users[at][user], items[at][item], *others)


@dataclass(eq=False)
class FilterRatings(CountingStage):
    """Keep ratings >= min_rating, then drop the rating column: the rest is implicit feedback.

    With None all ratings are kept, also negative ones.
    """

    min_rating: float | None = None

    def chunks(self) -> Iterator[RatingChunk]:
        for chunk in self.source:
            if self.min_rating is None:
                chunk = replace(chunk, rating=None)
            elif chunk.rating is not None:
                chunk = replace(chunk.where(chunk.rating >= self.min_rating), rating=None)
            elif self.min_rating > 0:
                raise UserError(
                    f"--min_rating {self.min_rating:g}: the data has no rating column; leave the "
                    "flag out or name the column with --columns"
                )
            yield chunk


@dataclass(eq=False)
class _FilterByCount(CountingStage):
    min_count: int = 0
    column: ClassVar[str]

    def chunks(self) -> Iterator[RatingChunk]:
        if self.min_count <= 1:
            yield from self.source
            return
        chunks = list(self.source)
        codes = [getattr(chunk, self.column) for chunk in chunks]
        counts = np.bincount(np.concatenate([np.zeros(0, np.int32), *codes]))
        del codes
        for chunk in _drained(chunks):
            yield chunk.where(counts[getattr(chunk, self.column)] >= self.min_count)


class FilterItems(_FilterByCount):
    """Keep ratings of items that have at least `min_count` ratings (one pass)."""

    column = "item"


class FilterUsers(_FilterByCount):
    """Keep ratings of users who have at least `min_count` ratings (one pass)."""

    column = "user"


class Densify(CountingStage):
    """Renumber without gaps, in order of the codes: items 1..V, users 0..U-1.

    Once streamed, int64 ``kept_users`` [U] and ``kept_items`` [V] hold the codes of dense users 0,
    1, ... and items 1, 2, ...
    """

    def chunks(self) -> Iterator[RatingChunk]:
        chunks = list(self.source)
        users, items = np.zeros(0, bool), np.zeros(0, bool)
        for chunk in chunks:
            users, items = _marked(users, chunk.user), _marked(items, chunk.item)
        self.kept_users, self.kept_items = np.flatnonzero(users), np.flatnonzero(items)
        dense_user = (np.cumsum(users) - 1).astype(np.int32)
        dense_item = np.cumsum(items).astype(np.int32)
        for chunk in _drained(chunks):
            yield replace(chunk, user=dense_user[chunk.user], item=dense_item[chunk.item])


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
    """All chunks -> one `Histories`, by a stable sort by user and time.

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
        del chunks
        self.is_newest_first = times is not None and _falls(users, times)
        if self.newest_first:
            users, items = users[::-1], items[::-1]
            times = None if times is None else times[::-1]
            fractions = None if fractions is None else fractions[::-1]
        offsets = splits(np.bincount(users))
        key = users if times is None else _user_time_keys(users, times, fractions)
        del users
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
        yield Histories(items, offsets, times, fractions)

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


def _marked(marks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bool marks, enlarged if needed, with the codes' entries set."""
    size = int(codes.max(initial=-1)) + 1
    if size > len(marks):
        marks = np.concatenate([marks, np.zeros(max(size, 2 * len(marks)) - len(marks), bool)])
    marks[codes] = True
    return marks


def _drained(chunks: list[T]) -> Iterator[T]:
    """Yield the elements and remove each from the list, to free its memory."""
    chunks.reverse()
    while chunks:
        yield chunks.pop()


def _numpy(batch: pa.RecordBatch, role: str) -> np.ndarray | None:
    return batch.column(role).to_numpy() if role in batch.schema.names else None


def _id_type(parts: list[pa.Array]) -> pa.DataType:
    return pa.int64() if all(pa.types.is_integer(part.type) for part in parts) else pa.string()


def _encoded(parts: list[pa.Array]) -> tuple[pa.StringArray, list[np.ndarray]]:
    """The distinct ids in ascending order, and each part as int32 codes: indices in that order."""
    if _id_type(parts) == pa.string():
        parts = [part.cast(pa.string()) for part in parts]
    else:
        parts = [part.cast(pa.int64()) for part in parts]
    encoded = pa.concat_arrays(parts).dictionary_encode()
    ids = encoded.dictionary
    with suppress(pa.ArrowInvalid):  # sort as numbers if all are whole numbers in plain notation
        numbers = ids.cast(pa.int64())
        ids = numbers if numbers.cast(ids.type).equals(ids) else ids
    order = pc.sort_indices(ids).to_numpy()
    code = np.empty(len(order), np.int32)
    code[order] = np.arange(len(order), dtype=np.int32)
    codes = code[encoded.indices.to_numpy()]
    ends = np.cumsum([len(part) for part in parts])
    return ids.take(pa.array(order)).cast(pa.string()), np.split(codes, ends[:-1])
