"""Rows of a table from lists of items: user, rank, item, score, and title if the catalog has any.

Shapes: U users of a block, k items of each.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.jagged import jagged_positions
from pipeline.preparation.catalog import Catalog
from pipeline.serving.histories import KnownHistories


@dataclass(frozen=True, eq=False)
class Lists:
    """Recommendations for the users ``first``, ``first + 1``, ..., best first."""

    first: int
    items: np.ndarray  # int64 [U, k], dense ids; 0: fewer than k items may be recommended
    scores: np.ndarray  # float32 [U, k]

    def counts(self) -> np.ndarray:
        """int64 [U]: items of each list; places without one are at its end."""
        return np.count_nonzero(self.items, axis=1)


class ItemRows:
    """Rows of ranked items: rank, item, score[, title]."""

    def __init__(self, catalog: Catalog) -> None:
        self._items, self._titles = catalog.items.cast(catalog.item_type), catalog.titles
        fields = [("rank", pa.int32()), ("item", catalog.item_type), ("score", pa.float32())]
        self._has_titles = bool(pc.any(pc.not_equal(self._titles, "")).as_py())
        if self._has_titles:
            fields.append(("title", pa.string()))
        self.schema = pa.schema(fields)

    def columns(self, lists: Lists) -> dict[str, pa.Array]:
        """The columns of the lists' items, user by user."""
        counts = lists.counts()
        places = pa.array(lists.items[lists.items > 0] - 1)
        ranks = jagged_positions(np.zeros_like(counts), counts) + 1
        columns = {
            "rank": pa.array(ranks, pa.int32()),
            "item": self._items.take(places),
            "score": pa.array(lists.scores[lists.items > 0]),
        }
        if self._has_titles:
            columns["title"] = self._titles.take(places)
        return columns

    def table(self, lists: Lists) -> pa.Table:
        """One row an item."""
        return pa.table(self.columns(lists), schema=self.schema)


class UserRows(ItemRows):
    """Rows of recommendations: user, rank, item, score[, title][, popularity].

    The column ``popularity``, true for users without a known item, is there if there are any: they
    get the most popular items, and their scores are training counts.
    """

    def __init__(self, catalog: Catalog, histories: KnownHistories) -> None:
        super().__init__(catalog)
        self._users, self._empty = histories.users, histories.empty()
        self.schema = self.schema.insert(0, pa.field("user", self._users.type))
        if self._empty.any():
            self.schema = self.schema.append(pa.field("popularity", pa.bool_()))

    def columns(self, lists: Lists) -> dict[str, pa.Array]:
        """The columns of the users' recommendations, user by user."""
        counts = lists.counts()
        users = np.repeat(lists.first + np.arange(len(counts)), counts)
        columns = {"user": self._users.take(pa.array(users)), **super().columns(lists)}
        if "popularity" in self.schema.names:
            columns["popularity"] = pa.array(self._empty[users])
        return columns
