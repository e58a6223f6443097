"""The values of ratings, by one rule for all formats: ids, ratings and exact times.

A time is two columns: ``timestamp`` (int64), its whole part, and only where a table has times that
are not whole ``fraction`` (float64, between -1 and 1, with the time's sign), the rest. Their order
is the exact order of the times; a time that two columns cannot hold exactly is refused.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal

import pyarrow as pa
import pyarrow.compute as pc

BLANKS = " \t"  # around an id in a text file, they do not count
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PARTS = r"^(?:(?P<sign>-)|\+?)(?P<whole>[0-9]+)\.?(?P<rest>[0-9]*?)0*$"
# Digits of a number in full: 5e-324 has 324 after the point.
_MOST_DIGITS = 400


def checked(table: pa.Table, needs_rating: bool = True) -> pa.Table:
    """The table with exact times; dates become nanoseconds.

    Unless it `needs_rating`, a rating may be missing; it becomes NaN.

    Raises:
        ValueError: a value is missing, or is not allowed in its column.
    """
    for at, role in enumerate(table.column_names):
        column = table[role]
        if role == "rating" and pa.types.is_boolean(column.type):
            column = column.cast(pa.float64())
            table = table.set_column(at, role, column)
        if column.null_count and role == "rating" and not needs_rating:
            table = table.set_column(at, role, column.fill_null(math.nan))
            column = column.drop_null()
        if column.null_count:
            raise ValueError(f"a {role} is missing")
        if pa.types.is_temporal(column.type):
            zone = getattr(column.type, "tz", None)
            table = table.set_column(at, role, column.cast(pa.timestamp("ns", zone)))
        elif role == "timestamp":
            whole, fraction = split_times(column)
            table = table.set_column(at, role, whole)
            if fraction is not None:
                table = table.append_column("fraction", fraction)
        elif pa.types.is_floating(column.type) and pc.any(pc.invert(pc.is_finite(column))).as_py():
            raise ValueError(f"a {role} is not a finite number")
        elif pa.types.is_dictionary(column.type):
            for chunk in column.chunks:
                chunk.dictionary.validate(full=True)  # Parquet may hold text that is no UTF-8
                empty = pc.equal(pc.utf8_trim_whitespace(chunk.dictionary), "")
                # --where may have left out all rows with an id.
                if pc.any(empty).as_py() and pc.any(empty.take(chunk.indices)).as_py():
                    raise ValueError(f"the {role} id is empty")
    return table


def with_whole_times(table: pa.Table) -> tuple[pa.Table, str]:
    """A `checked` table with dates as int64, and how its times are written ("": as numbers)."""
    if "timestamp" not in table.column_names:
        return table, ""
    place = table.column_names.index("timestamp")
    kind = table["timestamp"].type
    if not pa.types.is_temporal(kind):
        return table, ""
    times = table["timestamp"].cast(pa.int64())
    form = " (as dates)" if kind.tz is None else " (with a zone)"
    return table.set_column(place, "timestamp", times), form


def split_times(times: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """The whole parts (int64) of numbers or of text, and the rest (float64; None if all are whole).

    Raises:
        ValueError: a time is no number, its whole part does not fit into 64 bits, or two columns
            do not hold it exactly (`time_mistake` says which).
    """
    if pa.types.is_integer(times.type):
        return times.cast(pa.int64()), None
    if not pa.types.is_floating(times.type):
        return _split_text(pc.utf8_trim_whitespace(times.cast(pa.string())))
    times = times.cast(pa.float64())
    whole = pc.trunc(times)
    rest = pc.subtract(times, whole)
    return whole.cast(pa.int64()), rest if pc.any(pc.not_equal(rest, 0)).as_py() else None


def _split_text(text: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
    """`split_times` by digits: Arrow's decimal256 division is wrong for some numbers."""
    parts = pc.extract_regex(text, _PARTS)
    if parts.null_count:
        text = pa.chunked_array([[_in_full(each) for each in text.to_pylist()]], pa.string())
        parts = pc.extract_regex(text, _PARTS)
    sign, whole, digits = (pc.struct_field(parts, at) for at in range(3))
    whole = pc.binary_join_element_wise(sign, whole, "").cast(pa.int64())
    if not pc.any(pc.not_equal(digits, "")).as_py():
        return whole, None
    exact = pc.binary_join_element_wise(sign, "0.", digits, "")
    rest = pc.binary_join_element_wise(exact, "0", "").cast(pa.float64())
    # Where a rest is the shortest number that its float64 can be written as, no other rest has the
    # same float64.
    shortest = rest.cast(pa.string())
    differ = pc.and_(pc.not_equal(shortest, exact), pc.not_equal(digits, ""))
    for one, other in zip(shortest.filter(differ), exact.filter(differ), strict=True):
        if Decimal(one.as_py()) != Decimal(other.as_py()):
            raise ValueError("a timestamp has too many digits")
    return whole, rest


def _in_full(text: str) -> str:
    """A number without exponent, and with a digit before the point."""
    if not is_number(text):
        raise ValueError("a timestamp is not a number")
    number = Decimal(text)
    if number and not -_MOST_DIGITS < number.adjusted() < _MOST_DIGITS:
        raise ValueError("a timestamp has too many digits")
    return f"{number:f}" if number else "0"


def is_number(text: str) -> bool:
    """Whether a text is a finite number; Python's float accepts more ("1_0")."""
    return _NUMBER.fullmatch(text) is not None


def time_mistake(text: str) -> str:
    """What is wrong with a text as a time that is a number, "" if nothing is."""
    try:
        split_times(pa.chunked_array([[text]]))
        return ""
    except ValueError:
        pass
    if not is_number(text):
        return "is not a number"
    if not -(1 << 63) <= float(text) < 1 << 63:
        return "does not fit into 64 bits"
    return "has too many digits after the point to be compared exactly: round the times"


def first_failing(count: int, fails: Callable[[int, int], bool]) -> int:
    """The first of `count` rows that is wrong; `fails(start, end)` tells whether one of these is.

    Each test halves the range, so that all of them together cost as much as one of all rows.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low
