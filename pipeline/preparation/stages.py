"""The stages between a ratings file and histories: encode, filter, densify.

    dense = Densify(FilterRatings(EncodeIds(ReadRatings("ratings.csv")), min_rating=4))
    histories = next(GroupByUser(dense))                   # grouping.py

Afterwards a stage's `counts` describe its output.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.preparation.parts import TRAINING
from pipeline.stage import Stage

T = TypeVar("T")
_VALUES = ("rating", "timestamp", "fraction", "part")


@dataclass(frozen=True)
class RatingChunk:
    """N ratings in file order."""

    user: np.ndarray  # int32 [N], codes from 0
    item: np.ndarray  # int32 [N], codes from 0; once densified, ids from 1
    rating: np.ndarray | None = None  # float64 [N]
    timestamp: np.ndarray | None = None  # int64 [N]; None: file order is time order
    # float64 [N], the rest of times that are not whole (pipeline/sources/values.py); None: 0.
    fraction: np.ndarray | None = None
    part: np.ndarray | None = None  # int8 [N], codes of parts.py; None: leave-one-out

    def where(self, keep: np.ndarray) -> "RatingChunk":
        if keep.all():
            return self
        columns = {name: column for name, column in vars(self).items() if column is not None}
        return RatingChunk(**{name: column[keep] for name, column in columns.items()})


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
                values = (_numpy(batch, name) for name in _VALUES)
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
    """Ratings of the training part count, all are kept or dropped."""

    min_count: int = 0
    column: ClassVar[str]

    def chunks(self) -> Iterator[RatingChunk]:
        if self.min_count <= 1:
            yield from self.source
            return
        chunks = list(self.source)
        codes = [getattr(chunk, self.column) for chunk in chunks]
        size = max((int(part.max()) + 1 for part in codes), default=0)
        codes = [
            part if chunk.part is None else part[chunk.part == TRAINING]
            for part, chunk in zip(codes, chunks, strict=True)
        ]
        counts = np.bincount(np.concatenate([np.zeros(0, np.int32), *codes]), minlength=size)
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
