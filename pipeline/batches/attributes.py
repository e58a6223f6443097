"""Attributes of the items: rows of the item table behind the mask token, V items, A attributes.

    item  genres          --item_attributes "genres,studio"
    7     drama|war       row 7 + row (genres, drama) + row (genres, war) + row (studio, ...)

    rows of the table     0 padding | 1 ... V items | V + 1 mask token | V + 2 ... V + 1 + A

An attribute is a value of a column; those of a single item say no more than its own row, and are
left out. Each step looks up all A rows, once, and sums them item by item (``model/network``). An
item that is not trained on is the sum of its attributes: its own row is never a target's.

Shapes: P most attributes of an item.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.preparation.catalog import Catalog
from pipeline.tables.names import list_names
from pipeline.tables.sequences import is_list

LEAST_ITEMS = 2  # of an attribute
# Every step looks up all attributes; every item has as many places as the one with the most.
MOST_ATTRIBUTES, MOST_OF_AN_ITEM = 100_000, 64


@dataclass(frozen=True, eq=False)
class ItemAttributes:
    """The attributes of each row of padding, items and mask token."""

    places: np.ndarray  # int32 [V + 2, P], numbers 0 ... A - 1, then A: none
    count: int  # A
    own: np.ndarray  # bool [V + 2], whose own rows count: not of untrained items with attributes
    without: tuple[str, ...] = ()  # the columns that hold none of them

    @classmethod
    def of(cls, catalog: Catalog, columns: str, separator: str) -> "ItemAttributes":
        """The attributes that the table of the items (``--items_path``) has in ``columns``.

        Args:
            columns: names, with commas between them.
            separator: between several values in one text; a list has its elements.

        Raises:
            UserError: there is no such column, or no attribute, or there are too many.
        """
        names = dict.fromkeys(name.strip() for name in columns.split(","))
        pairs = [_pairs(catalog, name, separator) for name in names]
        items, numbers, count = _joined(pairs)
        items_of = np.bincount(numbers, minlength=count)
        kept = np.flatnonzero(items_of >= LEAST_ITEMS)
        flag = f"--item_attributes {columns}"
        if not len(kept):
            raise UserError(
                f"{flag}: no value is that of two items: an attribute is one that items share; "
                "check --attribute_separator"
            )
        if len(kept) > MOST_ATTRIBUTES:
            raise UserError(
                f"{flag}: {len(kept):,} values are those of at least two items, and every step "
                f"looks up all: at most {MOST_ATTRIBUTES:,}, leave a column out"
            )
        new = np.full(count, len(kept))
        new[kept] = np.arange(len(kept))
        inside = new[numbers] < len(kept)
        items, numbers = items[inside], new[numbers[inside]]
        each = np.bincount(items, minlength=len(catalog.items) + 2)
        if each.max() > MOST_OF_AN_ITEM:
            raise UserError(
                f"{flag}: item {catalog.item_id(int(each.argmax()))} has {each.max()} attributes: "
                f"at most {MOST_OF_AN_ITEM}, leave a column out"
            )
        places = np.full((len(each), each.max()), len(kept), np.int32)
        order = np.lexsort((numbers, items))
        items, numbers = items[order], numbers[order]
        places[items, np.arange(len(items)) - (np.cumsum(each) - each)[items]] = numbers
        own = np.ones(len(each), bool)
        own[1:-1] = catalog.is_trained() | (each[1:-1] == 0)
        ends = np.cumsum([size for _, _, size in pairs])
        used = np.searchsorted(ends, kept, side="right")  # columns, by their places in `names`
        without = tuple(name for place, name in enumerate(names) if place not in used)
        return cls(places, len(kept), own, without)

    def fingerprint(self) -> str:
        """Hash of all attributes."""
        digest = hashlib.sha256(f"{self.count} {self.places.shape}".encode())
        digest.update(np.ascontiguousarray(self.places).data)
        digest.update(self.own.data)
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """How many there are, as a line for the user."""
        each = (self.places < self.count).sum(axis=1)[1:-1]
        return (
            f"{self.count:,} attributes of at least {LEAST_ITEMS} items, {each.mean():.1f} of an "
            f"item; {np.count_nonzero(each == 0):,} items have none"
            + (f"; no value of {list_names(self.without)} is that of two" if self.without else "")
        )


def _pairs(catalog: Catalog, name: str, separator: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Items and numbers of their values in a column, each pair once; how many values there are."""
    column = _column(catalog, name)
    values, items = column, np.arange(1, len(column) + 1)
    if is_list(column.type):
        items = items[pc.list_parent_indices(column).to_numpy()]
        values = pc.list_flatten(column)
    if pa.types.is_floating(values.type):  # a missing number, to some
        values = pc.if_else(pc.is_nan(values), None, values)
    try:
        texts = values.cast(pa.string()).fill_null("").to_pylist()
    except pa.ArrowException as error:
        raise UserError(
            f"--item_attributes: the column {name!r} holds {column.type}: attributes are texts, "
            "numbers or lists of them"
        ) from error
    found = ([text] if is_list(column.type) else text.split(separator) for text in texts)
    pairs = dict.fromkeys(
        (item, value)
        for item, each in zip(items.tolist(), found, strict=True)
        for value in filter(None, map(str.strip, each))
    )
    coded = pa.array([value for _, value in pairs], pa.string()).dictionary_encode()
    numbers = coded.indices.to_numpy().astype(np.int64)
    return np.array([item for item, _ in pairs], np.int64), numbers, len(coded.dictionary)


def _column(catalog: Catalog, name: str) -> pa.Array:
    """A column of the table of the items; "title" is that of the titles, whatever its name."""
    columns: dict[str, pa.ChunkedArray] = {}
    if pc.any(pc.not_equal(catalog.titles, "")).as_py():
        columns["title"] = pa.chunked_array([catalog.titles])
    if (table := catalog.attributes) is not None:
        columns |= zip(table.column_names, table.columns, strict=True)
    if name not in columns:
        raise UserError(
            f"--item_attributes: {name!r} is no column of the table of the items, --items_path: "
            f"it has {list_names([*columns]) or 'none'}"
        )
    return columns[name].combine_chunks()


def _joined(
    pairs: list[tuple[np.ndarray, np.ndarray, int]],
) -> tuple[np.ndarray, np.ndarray, int]:
    """The pairs of all columns: equal values of two columns are two attributes."""
    before, items, numbers = 0, [], []
    for of_items, of_values, count in pairs:
        items.append(of_items)
        numbers.append(of_values + before)
        before += count
    return np.concatenate(items), np.concatenate(numbers), before
