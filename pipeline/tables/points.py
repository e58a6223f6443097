"""Points in time that a flag gives: a date, or a number in the unit of the data's own times.

2011-06-01    2011-06-01 12:00    2011-06-01T12:00:00Z    1306886400    12.5
"""

import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import pyarrow as pa

from pipeline.errors import UserError
from pipeline.tables.times import date_mistake, read_dates

_NUMBER = re.compile(r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})")
_UNITS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}  # nanoseconds of each


@dataclass(frozen=True)
class Point:
    """A point in time: nanoseconds since 1970 if it is a date, else the number itself."""

    text: str
    value: Fraction
    is_date: bool
    flag: str = "--split_time"

    def in_unit(self, unit: str, are_dates: bool) -> Fraction:
        """The point in the data's unit ("s", "ms", "us", "ns"; "": unknown).

        Raises:
            UserError: it is a date and the unit is unknown, or a number and the times are dates.
        """
        if self.is_date and unit not in _UNITS:
            raise UserError(
                f"{self.flag} {self.text}: the times of the data are numbers of unknown unit: "
                "give a number"
            )
        if not self.is_date and are_dates:
            raise UserError(f"{self.flag} {self.text}: the times of the data are dates: give one")
        return self.value / _UNITS[unit] if self.is_date else self.value


def read_points(times: str, until: str = "") -> list[Point]:
    """The points of --split_time, with commas between them, and that of --split_until, if any.

    Raises:
        UserError: one is neither a number nor a date, or they do not ascend.
    """
    points = [read_point(each.strip(), "--split_time") for each in times.split(",")]
    if until:
        points.append(read_point(until.strip(), "--split_until"))
    for one, other in pairwise(points):
        given = f"{other.flag} {until if other.flag == '--split_until' else times}"
        if one.is_date != other.is_date:
            raise UserError(f"{given}: give dates or numbers, not both")
        if one.value >= other.value:
            raise UserError(f"{given}: {other.text} is not after {one.text}")
    return points


def read_point(text: str, flag: str) -> Point:
    """A number or a date; ``flag`` names it in a UserError if it is neither."""
    if _NUMBER.fullmatch(text):
        return Point(text, Fraction(Decimal(text)), False, flag)
    try:
        found = read_dates(pa.chunked_array([[text]], pa.string()))
    except ValueError as error:
        raise UserError(f"{flag}: {text!r} {date_mistake(text)}") from error
    return Point(text, Fraction(found.cast(pa.int64())[0].as_py()), True, flag)
