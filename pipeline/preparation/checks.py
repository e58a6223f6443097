"""What in the ratings may mean something else: warnings, and an error for mixed units of time."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError, warn
from pipeline.preparation.grouping import GroupByUser

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
FINER = 10**6  # parts of a unit, where times are not whole
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# Times between 1990 and 2050, in seconds.
_FROM, _TO = 631_152_000, 2_524_608_000
# Numbers of 64 bits beyond these are in one unit only, whenever it was: seconds from 1973 to 5138.
_FIRST, _LAST = 10**8, 10**11


def time_unit(times: np.ndarray, name: str) -> str:
    """Unit of times (int64) since 1970: "s", "ms", "us", "ns", or "" if they are no such times.

    Raises:
        UserError: some are times of our days in one unit and all others in another.
    """
    sizes = times[times >= _FIRST]
    if not len(sizes):
        return ""
    low, high = int(sizes.min()), int(sizes.max())
    for unit, scale in UNITS.items():
        if _FIRST * scale <= low <= high < _LAST * scale:
            return unit
    ours = {
        unit: sizes[(_FROM * scale <= sizes) & (sizes < _TO * scale)]
        for unit, scale in UNITS.items()
    }
    found = {unit: part for unit, part in ours.items() if len(part)}
    if sum(map(len, found.values())) == len(sizes):
        parts = ", ".join(
            f"{len(part):,} in {_NAMES[unit]} (as {part[0]})" for unit, part in found.items()
        )
        raise UserError(
            f"the times of {name} are in several units: {parts}; write all in one, or choose rows "
            "with --where"
        )
    return ""


def in_int64(times: np.ndarray, fractions: np.ndarray | None, unit: str) -> tuple[np.ndarray, str]:
    """int64 [R]: the times, in millionths of their unit where some are not whole; and their unit.

    The order of the whole times is kept; if the millionths do not fit, only whole parts are.
    """
    limit = (1 << 63) // FINER - 1
    if fractions is None or not -limit < times.min() <= times.max() < limit:
        return times, unit
    finer = {"s": "us", "ms": "ns"}.get(unit, f"1e-6 {unit}".strip())
    return times * FINER + np.round(fractions * FINER).astype(np.int64), finer


def shown_time(time: int, unit: str) -> str:
    """A time as a date, or as a number if the unit is unknown."""
    return str(np.datetime64(time // UNITS[unit], "s")) if unit in UNITS else f"{time:,}"


def warn_of_order(grouped: GroupByUser, name: str) -> None:
    """Warn if equal times keep the order of a file that seems to begin with the newest."""
    if grouped.ties and grouped.is_newest_first and not grouped.newest_first:
        warn(
            f"{name} begins with the newest ratings, and {grouped.ties:,} ratings share a user and "
            "a time with another one: they are taken in the order of the file; if the newest of "
            "them is the first, give --file_order newest_first"
        )


def warn_of_look_alikes(ids: pa.StringArray, role: str, name: str) -> None:
    """Warn of ids that differ only in the case of letters or in blanks."""
    plain = pc.replace_substring_regex(pc.utf8_lower(ids), r"\s+", "")
    encoded = plain.dictionary_encode()
    count = len(ids) - len(encoded.dictionary)
    if not count:
        return
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    first = order[np.flatnonzero(codes[order][1:] == codes[order][:-1])[0] + np.arange(2)]
    examples = " and ".join(repr(ids[int(at)].as_py()) for at in first)
    warn(
        f"{count:,} {role} ids of {name} differ from others only in the case of letters or in "
        f"blanks, for example {examples}: they are different {role}s; if they are not, write them "
        "in one way"
    )
