"""Histories to recommend from, in the dense ids of a model's catalog.

    of_store(store)                            all ratings of the users in the training data
    of_lists([["1193", "661"], []], catalog)   somebody new: original ids, oldest first
    of_ratings(ReadRatings(file), catalog)     ratings in any format that training reads

Items that the catalog does not have are left out and counted. Users without a known item stay.

Shapes: U users, R known items of all, V items.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torchdata.nodes import BaseNode, IterableWrapper

from pipeline.errors import UserError
from pipeline.formats.parquet import ReadTable
from pipeline.jagged import jagged_positions, splits
from pipeline.preparation.catalog import Catalog
from pipeline.preparation.grouping import GroupByUser
from pipeline.preparation.stages import EncodeIds
from pipeline.preparation.store import SequenceStore
from pipeline.tables.names import Wanted


@dataclass(frozen=True, eq=False)
class KnownHistories:
    """User u's known items, in time order, are items[offsets[u]:offsets[u + 1]]."""

    users: pa.Array  # [U] original ids, of the type that they have in their source
    items: np.ndarray  # int32 [R], dense ids
    offsets: np.ndarray  # int64 [U + 1]
    unknown: int = 0  # items of the source that the catalog does not have

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def empty(self) -> np.ndarray:
        """bool [U]: users without a known item."""
        return np.diff(self.offsets) == 0

    def only(self, users: np.ndarray) -> "KnownHistories":
        """The histories of these users, int64 places, in this order."""
        begin, end = self.offsets[users], self.offsets[users + 1]
        items = self.items[jagged_positions(begin, end)]
        return replace(
            self, users=self.users.take(pa.array(users)), items=items, offsets=splits(end - begin)
        )


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


def of_store(store: SequenceStore) -> KnownHistories:
    """The whole histories of all users, held-out items included."""
    users = store.catalog.users.cast(store.catalog.user_type)
    return KnownHistories(users, store.items, store.offsets)


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
    source: BaseNode[pa.Table], catalog: Catalog, min_rating: float | None = None
) -> KnownHistories:
    """Histories of tables of ratings, users in ascending order of their ids.

    Args:
        min_rating: ratings below it are dropped, as in training, where there is a rating column;
            None: no rating is.
    """
    encoded, chunks = EncodeIds(source), []
    for chunk in encoded:
        if chunk.rating is not None and min_rating is not None:
            chunk = replace(chunk.where(chunk.rating >= min_rating))
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
    return KnownHistories(users, grouped.items, offsets, unknown)


def ratings_in_memory(table: pa.Table) -> BaseNode[pa.Table]:
    """The source of ratings in a table, by the rules for Parquet; columns by well-known names."""
    return ReadTable(table, Wanted(columns=None, needs_rating=False))


def _known(users: pa.Array, user: np.ndarray, items: np.ndarray) -> KnownHistories:
    """Histories of items in the users' order (``user``: the user of each), without unknown ones."""
    known = items > 0
    lengths = np.bincount(user[known], minlength=len(users))
    return KnownHistories(users, items[known], splits(lengths), int((~known).sum()))
