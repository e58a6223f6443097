"""Histories to recommend from, in the dense ids of a model's catalog.

    of_store(store)                            all ratings of the users in the training data
    of_lists([["1193", "661"], []], catalog)   somebody new: original ids, oldest first
    of_ratings(ReadRatings(file), catalog)     ratings in any format that training reads

Items that the catalog does not have are left out and counted. Users without a known item stay. For
models that read times, histories of a store or of ratings have them, in seconds since 1970.

Shapes: U users, R known items of all, V items.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torchdata.nodes import BaseNode, IterableWrapper

from pipeline.batches.times import ItemTimes
from pipeline.errors import UserError
from pipeline.formats.parquet import ReadTable
from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.checks import UNITS, time_unit
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.stages import EncodeIds
from pipeline.preparation.store import SequenceStore
from pipeline.tables.names import Wanted
from pipeline.tables.points import read_point


@dataclass(frozen=True, eq=False)
class KnownHistories:
    """User u's known items, in time order, are items[offsets[u]:offsets[u + 1]]."""

    users: pa.Array  # [U] original ids, of the type that they have in their source
    items: np.ndarray  # int32 [R], dense ids
    offsets: np.ndarray  # int64 [U + 1]
    unknown: int = 0  # items of the source that the catalog does not have
    times: np.ndarray | None = None  # int64 [R], of the items; None: unknown, or not read
    at: np.ndarray | None = None  # int64 [U], when users are recommended to; with ``times``

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def empty(self) -> np.ndarray:
        """bool [U]: users without a known item."""
        return np.diff(self.offsets) == 0

    def only(self, users: np.ndarray) -> "KnownHistories":
        """The histories of these users, int64 places, in this order."""
        begin, end = self.offsets[users], self.offsets[users + 1]
        places = jagged_positions(begin, end)
        times = None if self.times is None else self.times[places]
        at = None if self.at is None else self.at[users]
        chosen, offsets = self.users.take(pa.array(users)), splits(end - begin)
        return replace(
            self, users=chosen, items=self.items[places], offsets=offsets, times=times, at=at
        )

    def requested(self, at: int | None, newest: int) -> "KnownHistories":
        """The histories that have times, recommended to ``at`` this time, in seconds since 1970.

        None: at ``newest``, or at the time of the user's last item if that is later.
        """
        if self.times is None or self.at is not None:
            return self
        moments = np.full(len(self), newest if at is None else at)
        known = ~self.empty()
        if at is None:
            last = self.times[self.offsets[1:][known] - 1]
            moments[known] = np.maximum(moments[known], last)
        return replace(self, at=moments)


def dense_ids(ids: Iterable[object] | pa.Array, catalog: Catalog) -> np.ndarray:
    """Dense ids of original ids (text or whole numbers): int32, 0 for an unknown one.

    Raises:
        UserError: ``ids`` is a text, not a list.
    """
    if isinstance(ids, (str, bytes)):
        raise UserError(f"item ids must be a list, not the text {ids!r}")
    if not isinstance(ids, pa.Array):
        ids = pa.array([str(each) for each in ids], pa.string())
    found = pc.index_in(ids, value_set=catalog.items)
    return pc.fill_null(pc.add(found, 1), 0).to_numpy(zero_copy_only=False).astype(np.int32)


def item_number(item: object, catalog: Catalog) -> int:
    """Dense id of an original one; UserError if there is none."""
    (found,) = dense_ids([item], catalog)
    if not found:
        raise UserError(f"unknown item {item}: the model's catalog does not have it")
    return int(found)


def moment(at: object, flag: str) -> int:
    """Seconds since 1970 of a date, or of a number, whose size shows its unit as in ratings.

    Raises:
        UserError: it is neither.
    """
    point = read_point(str(at).strip(), flag)
    if point.is_date:
        return math.floor(point.value / UNITS["ns"])
    whole = math.floor(point.value)
    unit = time_unit(np.array([whole]), flag) if abs(whole) < 1 << 63 else ""
    if not unit:
        raise UserError(f"{flag} {at}: no date, and no seconds (or ms, us, ns) since 1970")
    return math.floor(point.value / UNITS[unit])


def of_store(store: SequenceStore, with_times: bool = False) -> KnownHistories:
    """The whole histories of all users, held-out items included."""
    users = store.catalog.users.cast(store.catalog.user_type)
    times = ItemTimes(store).seconds(slice(None)) if with_times else None
    return KnownHistories(users, store.items, store.offsets, times=times)


def of_lists(histories: Sequence[Iterable[object]], catalog: Catalog) -> KnownHistories:
    """Histories of original ids, oldest first; users are numbered from 0.

    Raises:
        UserError: a history is a text, not a list.
    """
    if any(isinstance(history, (str, bytes)) for history in histories):
        raise UserError("histories must be lists of item ids, one list a user, not single ids")
    lists = [list(history) for history in histories]
    items = dense_ids([item for history in lists for item in history], catalog)
    return _known(
        pa.array(np.arange(len(lists))),
        np.repeat(np.arange(len(lists)), [len(history) for history in lists]),
        items,
    )


def of_ratings(
    source: BaseNode[pa.Table],
    catalog: Catalog,
    min_rating: float | None = None,
    with_times: bool = False,
) -> KnownHistories:
    """Histories of tables of ratings, users in ascending order of their ids.

    Args:
        min_rating: ratings below it are dropped, as in training, where there is a rating column;
            None: no rating is.
        with_times: the histories have times, if those of the ratings have a known unit.
    """
    encoded, chunks = EncodeIds(source), []
    for chunk in encoded:
        if chunk.rating is not None and min_rating is not None:
            chunk = chunk.where(chunk.rating >= min_rating)
        chunks.append(replace(chunk, rating=None))
    dense = dense_ids(encoded.items, catalog)
    known = [replace(chunk, item=dense[chunk.item]) for chunk in chunks]
    known = [chunk.where(chunk.item > 0) for chunk in known]
    users = encoded.users.cast(encoded.types["user"])
    unknown = sum(len(chunk.user) for chunk in chunks) - sum(len(chunk.user) for chunk in known)
    if not any(len(chunk.user) for chunk in known):
        return KnownHistories(users, np.zeros(0, np.int32), np.zeros(len(users) + 1, int), unknown)
    grouped = next(GroupByUser(IterableWrapper(known)))
    without = np.full(len(users) + 1 - len(grouped.offsets), len(grouped.items))
    offsets = np.concatenate([grouped.offsets, without])
    found = KnownHistories(users, grouped.items, offsets, unknown)
    if not with_times or grouped.times is None:
        return found
    unit = "ns" if getattr(source, "dates", False) else time_unit(grouped.times, "the histories")
    return replace(found, times=grouped.times // UNITS[unit]) if unit else found


def ratings_in_memory(table: pa.Table) -> BaseNode[pa.Table]:
    """The source of ratings in a table, by the rules for Parquet; columns by well-known names."""
    return ReadTable(table, Wanted(columns=None, needs_rating=False))


def _known(users: pa.Array, user: np.ndarray, items: np.ndarray) -> KnownHistories:
    """Histories of items in the users' order (``user``: the user of each), without unknown ones."""
    known = items > 0
    lengths = np.bincount(user[known], minlength=len(users))
    return KnownHistories(users, items[known], splits(lengths), int((~known).sum()))
