"""What the columns of a text file without a header are, by their values.

user item                  two columns
user item rating           a number up to 100 in the third
user item time             a date, or a number from 10^8 on (seconds since 1970: 1973) in it
user item rating time      a time in the fourth; in the third: user item time rating
user item item item ...    rows of different lengths, most longer than four
"""

from collections import Counter
from collections.abc import Sequence

from pipeline.tables.times import date_mistake

Rows = Sequence[Sequence[str]]
_LEAST_TIME, _MOST_RATING = 1e8, 100
_MOST_SHARE = 0.6  # of the rows of a table that have its commonest length, at least
_ROLES = ("user", "item", "rating", "timestamp")


def roles_by_values(rows: Rows) -> dict[str, int] | None:
    """The place of each role; None: a row is a user and its items.

    Raises:
        ValueError: the values allow several readings; the message says which.
    """
    lengths = Counter(map(len, rows))
    commonest = lengths.most_common(1)[0][1]
    if max(lengths) > len(_ROLES) and commonest < _MOST_SHARE * len(rows):
        return None
    width = len(rows[0])
    third = [row[2] for row in rows if len(row) > 2]
    if width > 2 and not any(map(_is_number, third)) and _kind(third) == "other":
        raise ValueError(
            'the third column is neither a rating nor a time; give --columns "1,2..." if a row is '
            'a user and its items, else for example "1,2,,4"'
        )
    whole = [row for row in rows if len(row) == width]
    _check_times(whole, width)
    places = {role: place for place, role in enumerate(_ROLES[:width])}
    if width == 3:
        kind = _kind([row[2] for row in whole])
        if kind == "time":
            return {"user": 0, "item": 1, "timestamp": 2}
        if kind == "either":
            raise ValueError(
                'the third column may be a rating or a time; give --columns "1,2,3" if it is a '
                'rating, "1,2,,3" if it is a time'
            )
    if width >= 4:
        kind, fourth = (_kind([row[at] for row in whole]) for at in (2, 3))
        if fourth not in ("time", "other") and kind == "time":
            return {"user": 0, "item": 1, "rating": 3, "timestamp": 2}
        users = {row[0] for row in whole}
        if fourth not in ("time", "other") and len(users) == len(whole) > 1:
            raise ValueError(
                "the rows may be ratings or a user and its items each; give --columns "
                '"1,2,3,4" if they are user, item, rating, time, "1,2..." if they are user, item, '
                "item, ..."
            )
    return places


def _check_times(rows: Rows, width: int) -> None:
    """ValueError if a column that would not be read as the time is one.

    In the first two only dates are: ids may be large numbers.
    """
    kinds = [_kind([row[at] for row in rows]) for at in range(width)]
    dates = [not any(map(date_mistake, {row[at] for row in rows})) for at in range(min(2, width))]
    later = [] if "time" in kinds[2:4] else kinds[4:]
    if any(dates) or "time" in later:
        place = dates.index(True) if any(dates) else kinds.index("time", 4)
        raise ValueError(
            f"column {place + 1} is a time; give the numbers of user, item, rating (or none) and "
            f'time: for example --columns "1,{2 if place > 1 else 3},,{place + 1}"'
        )


def _is_number(text: str) -> bool:
    try:
        return float(text) is not None
    except ValueError:
        return False


def _kind(values: Sequence[str]) -> str:
    """ "time", "rating", "either" (numbers), or "other"."""
    try:
        numbers = [abs(float(value)) for value in values]
    except ValueError:
        return "time" if not any(map(date_mistake, values)) else "other"
    if all(number >= _LEAST_TIME for number in numbers):
        return "time"
    return "rating" if all(number <= _MOST_RATING for number in numbers) else "either"
