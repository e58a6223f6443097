"""The stages between a ratings file and histories: encode, filter, densify.

    dense = Densify(FilterRatings(EncodeIds(ReadRatings("ratings.csv")), min_rating=4))
    histories = next(GroupByUser(dense))                   # grouping.py

Afterwards a stage's `counts` describe its output.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.preparation.held import Held, added, drained, enlarged
from pipeline.preparation.memory import Memory
from pipeline.preparation.parts import PARTS, TRAINING
from pipeline.stage import Stage

_MANY_IDS = 1 << 22  # not yet numbered; numbering them costs as much as numbering all of before
_VALUES = ("rating", "timestamp", "fraction", "part")


@dataclass(frozen=True)
class RatingChunk:
    """N ratings in file order."""

    user: np.ndarray  # int32 [N], codes from 0
    item: np.ndarray  # int32 [N], codes from 0; once densified, ids from 1
    rating: np.ndarray | None = None  # float64 [N]
    timestamp: np.ndarray | None = None  # int64 [N]; None: file order is time order
    # float64 [N], the rest of times that are not whole (pipeline/tables/values.py); None: 0.
    fraction: np.ndarray | None = None
    part: np.ndarray | None = None  # int8 [N], codes of parts.py; None: leave-one-out

    def where(self, keep: np.ndarray) -> "RatingChunk":
        """The ratings for which ``keep``, bool [N], is true."""
        if keep.all():
            return self
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return RatingChunk(**{name: column[keep] for name, column in columns.items()})


class CountingStage(Stage[RatingChunk]):
    """A stage whose subclasses implement `chunks`; it counts their output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._ratings, self._users, self._items = 0, np.zeros(0, bool), np.zeros(0, bool)
        self.ratings_of_parts = np.zeros(PARTS, np.int64)  # 0 with leave-one-out

    def stream(self) -> Iterator[RatingChunk]:
        self._reset_counts()
        for chunk in self.chunks():
            if len(chunk.user):
                self._ratings += len(chunk.user)
                if chunk.part is not None:
                    self.ratings_of_parts += np.bincount(chunk.part, minlength=PARTS)
                self._users = _marked(self._users, chunk.user)
                self._items = _marked(self._items, chunk.item)
                yield chunk

    def chunks(self) -> Iterator[RatingChunk]:
        raise NotImplementedError(type(self))

    @property
    def counts(self) -> dict[str, int]:
        """How many ratings, and different users and items, the stage has yielded."""
        return {
            "ratings": self._ratings,
            "users": int(self._users.sum()),
            "items": int(self._items.sum()),
        }


@dataclass(eq=False)
class EncodeIds(CountingStage):
    """Arrow tables -> `RatingChunk`s: original ids become int32 codes, in ascending order of ids.

    Ids are sorted as numbers if all are whole numbers, else as text: codes do not depend on the
    file's chunks. Once streamed, string arrays ``users`` and ``items`` hold the original id of
    every code, ``types`` the type of both in the source: string, or int64 for columns of whole
    numbers.
    """

    memory: Memory = field(default_factory=Memory)

    def chunks(self) -> Iterator[RatingChunk]:
        users, items = _Ids(), _Ids()
        held, waiting = Held[RatingChunk](self.memory), list[RatingChunk]()
        size = 0
        for table in self.source:
            for batch in table.to_batches():
                columns = users.indices(batch.column("user")), items.indices(batch.column("item"))
                values = (_numpy(batch, name) for name in _VALUES)
                waiting.append(RatingChunk(*columns, *values))
                size += batch.nbytes
                if size > self.memory.limit or max(users.waiting, items.waiting) > _MANY_IDS:
                    for chunk in _numbered(waiting, users.number(), items.number()):
                        held.add(chunk)
                    size = 0
        of_users, of_items = users.number(), items.number()
        if users.ids is None or items.ids is None:
            raise UserError("there are no ratings in the data set")
        self.types = {"user": users.kind, "item": items.kind}
        self.users, user_codes = users.ascending()
        self.items, item_codes = items.ascending()
        for chunk in held.drained():
            yield replace(chunk, user=user_codes[chunk.user], item=item_codes[chunk.item])
        yield from _numbered(
            waiting,
            [user_codes[each] for each in of_users],
            [item_codes[each] for each in of_items],
        )


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
    """Ratings of the training part count, all are kept or dropped."""

    min_count: int = 0
    memory: Memory = field(default_factory=Memory)
    column: ClassVar[str]

    def chunks(self) -> Iterator[RatingChunk]:
        if self.min_count <= 1:
            yield from self.source
            return
        held, counts = Held[RatingChunk](self.memory), np.zeros(0, np.int64)
        for chunk in self.source:
            codes = getattr(chunk, self.column)
            counted = codes if chunk.part is None else codes[chunk.part == TRAINING]
            counts = added(enlarged(counts, codes), counted)
            held.add(chunk)
        for chunk in held.drained():
            yield chunk.where(counts[getattr(chunk, self.column)] >= self.min_count)


class FilterItems(_FilterByCount):
    """Keep ratings of items that have at least `min_count` ratings (one pass)."""

    column = "item"


class FilterUsers(_FilterByCount):
    """Keep ratings of users who have at least `min_count` ratings (one pass)."""

    column = "user"


@dataclass(eq=False)
class Densify(CountingStage):
    """Renumber without gaps, in order of the codes: items 1..V, users 0..U-1.

    Once streamed, int64 ``kept_users`` [U] and ``kept_items`` [V] hold the codes of dense users 0,
    1, ... and items 1, 2, ...
    """

    memory: Memory = field(default_factory=Memory)

    def chunks(self) -> Iterator[RatingChunk]:
        held = Held[RatingChunk](self.memory)
        users, items = np.zeros(0, bool), np.zeros(0, bool)
        for chunk in self.source:
            users, items = _marked(users, chunk.user), _marked(items, chunk.item)
            held.add(chunk)
        self.kept_users, self.kept_items = np.flatnonzero(users), np.flatnonzero(items)
        dense_user = (np.cumsum(users) - 1).astype(np.int32)
        dense_item = np.cumsum(items).astype(np.int32)
        for chunk in held.drained():
            yield replace(chunk, user=dense_user[chunk.user], item=dense_item[chunk.item])


class _Ids:
    """The distinct ids of a stream of columns, numbered in the order of their first appearance."""

    def __init__(self) -> None:
        self.ids: pa.Array | None = None
        self.waiting = 0  # ids of columns that are not yet numbered
        self._parts: list[pa.Array] = []

    @property
    def kind(self) -> pa.DataType:
        """string, or int64 if all columns were whole numbers."""
        assert self.ids is not None
        return self.ids.type

    def indices(self, column: pa.Array) -> np.ndarray:
        """The column's places in its own ids, which `number` will number."""
        if not pa.types.is_dictionary(column.type):
            column = column.dictionary_encode()
        self._parts.append(column.dictionary)
        self.waiting += len(column.dictionary)
        return column.indices.to_numpy(zero_copy_only=False)

    def number(self) -> list[np.ndarray]:
        """The numbers (int32) of the ids of each column since the last call."""
        before = [] if self.ids is None else [self.ids]
        parts = before + self._parts
        if not parts:
            return []
        whole = all(pa.types.is_integer(part.type) for part in parts)
        kind = pa.int64() if whole else pa.string()
        encoded = pa.concat_arrays([part.cast(kind) for part in parts]).dictionary_encode()
        self.ids = encoded.dictionary
        ends = np.cumsum([len(part) for part in parts])
        numbers = np.split(encoded.indices.to_numpy(), ends[:-1])[len(before) :]
        self.waiting, self._parts = -len(self.ids), []
        return numbers

    def ascending(self) -> tuple[pa.StringArray, np.ndarray]:
        """The ids in ascending order as text, and int32 [numbers]: the place of each in it."""
        ids = self.ids
        assert ids is not None
        # Sorted as numbers if all are whole numbers in plain notation.
        with suppress(pa.ArrowInvalid):
            numbers = ids.cast(pa.int64())
            ids = numbers if numbers.cast(ids.type).equals(ids) else ids
        order = pc.sort_indices(ids).to_numpy()
        places = np.empty(len(order), np.int32)
        places[order] = np.arange(len(order), dtype=np.int32)
        return ids.take(pa.array(order)).cast(pa.string()), places


def _numbered(
    chunks: list[RatingChunk], users: list[np.ndarray], items: list[np.ndarray]
) -> Iterator[RatingChunk]:
    """The chunks, which are given up, with the numbers of their users and items."""
    users.reverse()
    items.reverse()
    for chunk in drained(chunks):
        yield replace(chunk, user=users.pop()[chunk.user], item=items.pop()[chunk.item])


def _marked(marks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Bool marks, enlarged if needed, with the codes' entries set."""
    marks = enlarged(marks, codes)
    marks[codes] = True
    return marks


def _numpy(batch: pa.RecordBatch, role: str) -> np.ndarray | None:
    return batch.column(role).to_numpy() if role in batch.schema.names else None
