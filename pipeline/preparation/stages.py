"""The stages between a ratings file and histories: number, filter, densify, group.

    source = EncodeIds(ReadRatings("ratings.csv"))     # text ids -> int32 codes
    source = FilterRatings(source, min_rating=4)       # one pass each, in this order
    source = FilterItems(source, min_count=5)
    source = FilterUsers(source, min_count=5)
    source = Densify(source)                           # items 1..V, users 0..U-1
    histories = next(GroupByUser(source))

A stage is a `torchdata.nodes.BaseNode` over chunks of ratings. What a stage let through is in its
`counts` afterwards.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.sources.ratings import EXACT
from pipeline.stage import Stage


@dataclass(frozen=True)
class RatingChunk:
    """N ratings in file order.

    Attributes:
        user: int32 [N] user codes from 0.
        item: int32 [N] item codes from 0 (dense ids from 1 once densified).
        rating: float64 [N], or None.
        timestamp: int64 or float64 [N], or None: the file's order is the time order.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray | None = None
    timestamp: np.ndarray | None = None

    def where(self, keep: np.ndarray) -> "RatingChunk":
        """The ratings where bool [N] `keep` is set."""
        if keep.all():
            return self
        columns = (self.user, self.item, self.rating, self.timestamp)
        return RatingChunk(*(None if each is None else each[keep] for each in columns))


@dataclass(frozen=True)
class Histories:
    """items: int32 [R] user by user in time order; offsets: int64 [U+1]."""

    items: np.ndarray
    offsets: np.ndarray


class CountingStage(Stage[RatingChunk]):
    """A stage from chunks to chunks, which counts what it lets through."""

    def __init__(self, source: Iterable[Any]) -> None:
        super().__init__()
        self.source = source

    def stream(self) -> Iterator[RatingChunk]:
        self._ratings, self._users, self._items = 0, np.zeros(0, bool), np.zeros(0, bool)
        for chunk in self.chunks():
            if len(chunk.user):
                self._ratings += len(chunk.user)
                self._users = _mark(self._users, chunk.user)
                self._items = _mark(self._items, chunk.item)
                yield chunk

    def chunks(self) -> Iterator[RatingChunk]:
        raise NotImplementedError(type(self))

    @property
    def counts(self) -> dict[str, int]:
        """Ratings, distinct users and distinct items let through so far."""
        users, items = int(self._users.sum()), int(self._items.sum())
        return {"ratings": self._ratings, "users": users, "items": items}


class EncodeIds(CountingStage):
    """Original ids -> int32 codes in ascending order of the ids; Arrow tables -> `RatingChunk`s.

    The order is numeric where all ids are whole numbers, else that of the text, so that a code
    does not depend on how the file was chunked. Spaces around an id do not count.

    Attributes:
        users, items: string arrays, the original id of every code (once streamed).
    """

    def chunks(self) -> Iterator[RatingChunk]:
        local: dict[str, list[np.ndarray]] = {"user": [], "item": []}
        ids: dict[str, list[pa.Array]] = {"user": [], "item": []}
        rest: list[tuple[np.ndarray | None, np.ndarray | None]] = []
        for table in self.source:
            for batch in table.to_batches():
                for role in ids:
                    column = batch.column(role)
                    if not pa.types.is_dictionary(column.type):
                        column = column.dictionary_encode()
                    local[role].append(column.indices.to_numpy(zero_copy_only=False))
                    ids[role].append(column.dictionary)
                rest.append((_numpy(batch, "rating"), _numpy(batch, "timestamp")))
        if not rest:
            raise UserError("there are no ratings in the data set")
        self.users, users = _number(ids["user"])
        self.items, items = _number(ids["item"])
        for at, (rating, timestamp) in enumerate(rest):
            user, item = users[at][local["user"][at]], items[at][local["item"][at]]
            local["user"][at] = local["item"][at] = rest[at] = None  # hold no rating twice
            yield RatingChunk(user, item, rating, timestamp)


class FilterRatings(CountingStage):
    """Keep ratings >= min_rating, then drop the rating itself: what is left is implicit feedback.

    Raises:
        UserError: there are no ratings to compare, only users and items.
    """

    def __init__(self, source: Iterable[RatingChunk], min_rating: float = 0.0) -> None:
        super().__init__(source)
        self.min_rating = min_rating

    def chunks(self) -> Iterator[RatingChunk]:
        for chunk in self.source:
            if chunk.rating is not None:
                chunk = replace(chunk.where(chunk.rating >= self.min_rating), rating=None)
            elif self.min_rating > 0:
                raise UserError(
                    f"--min_rating {self.min_rating:g}: the data has no rating column; leave the "
                    "flag at 0 or name the column with --columns"
                )
            yield chunk


class _FilterByCount(CountingStage):
    column = ""

    def __init__(self, source: Iterable[RatingChunk], min_count: int) -> None:
        super().__init__(source)
        self.min_count = min_count

    def chunks(self) -> Iterator[RatingChunk]:
        if self.min_count <= 1:
            yield from self.source
            return
        chunks = list(self.source)
        counts = np.zeros(0, np.int64)
        for chunk in chunks:
            more = np.bincount(getattr(chunk, self.column), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        for chunk in _drained(chunks):
            yield chunk.where(counts[getattr(chunk, self.column)] >= self.min_count)


class FilterItems(_FilterByCount):
    """Keep ratings of items that have at least `min_count` ratings (one pass)."""

    column = "item"


class FilterUsers(_FilterByCount):
    """Keep ratings of users who have at least `min_count` ratings (one pass)."""

    column = "user"


class Densify(CountingStage):
    """Renumber what is left: items 1..V (0 is padding, V+1 the mask token), users 0..U-1.

    The order of the codes is kept.

    Attributes:
        kept_users: int64 [U], the code that each dense user had.
        kept_items: int64 [V], the code that dense item i+1 had.
    """

    def chunks(self) -> Iterator[RatingChunk]:
        chunks = list(self.source)
        users, items = np.zeros(0, bool), np.zeros(0, bool)
        for chunk in chunks:
            users, items = _mark(users, chunk.user), _mark(items, chunk.item)
        self.kept_users, self.kept_items = np.flatnonzero(users), np.flatnonzero(items)
        dense_user = (np.cumsum(users) - 1).astype(np.int32)
        dense_item = np.cumsum(items).astype(np.int32)
        for chunk in _drained(chunks):
            yield replace(chunk, user=dense_user[chunk.user], item=dense_item[chunk.item])


class GroupByUser(Stage[Histories]):
    """All chunks -> one `Histories`: user by user, in time order.

    Ratings of one user at the same time keep the order of the file (stable sort). An unstable sort
    moves the targets of data such as MovieLens, where many times are equal.
    """

    def __init__(self, source: Iterable[RatingChunk]) -> None:
        super().__init__()
        self.source = source

    def stream(self) -> Iterator[Histories]:
        chunks = list(self.source)
        if not chunks:
            return
        times = None
        if chunks[0].timestamp is not None:
            times = _joined([chunk.timestamp for chunk in chunks])
        users = np.concatenate([chunk.user for chunk in chunks])
        items = np.concatenate([chunk.item for chunk in chunks])
        del chunks
        offsets = np.concatenate(([0], np.cumsum(np.bincount(users))))
        order = _time_order(users, times)
        yield Histories(items if order is None else items[order], offsets.astype(np.int64))


def _joined(times: list[np.ndarray]) -> np.ndarray:
    """All times in one array: int64, or float64 if some are decimal.

    Raises:
        UserError: some are decimal and others too large to be compared with them exactly.
    """
    joined = np.concatenate(times)
    for part in times:
        if part.dtype != joined.dtype and np.abs(part).max(initial=0) > EXACT:
            raise UserError(
                "decimal timestamps among whole ones above 2^53 cannot be compared exactly: write "
                "all in one way, or leave them out with --columns"
            )
    return joined


def _time_order(users: np.ndarray, times: np.ndarray | None) -> np.ndarray | None:
    """Stable order by user, then time; None if the ratings are in it already."""
    key = users
    if times is not None:
        span = int(times.max()) - int(times.min()) + 1
        if times.dtype == np.int64 and span * (int(users.max()) + 1) < 1 << 63:
            times = times - times.min()
        else:
            times = np.unique(times, return_inverse=True)[1]
            span = int(times.max()) + 1
        # One sort by a combined key is four times as fast as np.lexsort.
        key = users * np.int64(span)
        key += times
    if (key[1:] >= key[:-1]).all():
        return None
    return np.argsort(key, kind="stable")


def _mark(marks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    size = int(codes.max()) + 1 if len(codes) else 0
    if size > len(marks):
        marks = np.concatenate([marks, np.zeros(max(size, 2 * len(marks)) - len(marks), bool)])
    marks[codes] = True
    return marks


def _drained(chunks: list[RatingChunk]) -> Iterator[RatingChunk]:
    """Hand the chunks on and forget them, so that no rating is held twice."""
    for at, chunk in enumerate(chunks):
        chunks[at] = None
        yield chunk


def _numpy(batch: pa.RecordBatch, role: str) -> np.ndarray | None:
    return batch.column(role).to_numpy() if role in batch.schema.names else None


def _number(parts: list[pa.Array]) -> tuple[pa.StringArray, list[np.ndarray]]:
    """Distinct ids in ascending order, and for each part the int32 number of each of its ids."""
    if not all(pa.types.is_integer(part.type) for part in parts):
        parts = [pc.utf8_trim_whitespace(part.cast(pa.string())) for part in parts]
    else:
        parts = [part.cast(pa.int64()) for part in parts]
    encoded = pa.concat_arrays(parts).dictionary_encode()
    order = pc.sort_indices(_sortable(encoded.dictionary)).to_numpy()
    number = np.empty(len(order), np.int32)
    number[order] = np.arange(len(order), dtype=np.int32)
    numbers = number[encoded.indices.to_numpy()]
    ends = np.cumsum([len(part) for part in parts])
    ids = encoded.dictionary.take(pa.array(order)).cast(pa.string())
    return ids, np.split(numbers, ends[:-1])


def _sortable(ids: pa.Array) -> pa.Array:
    """The ids as numbers if that is what they all are, else as they are."""
    if pa.types.is_integer(ids.type):
        return ids
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    return numbers if numbers.cast(pa.string()).equals(ids) else ids
